"""A small draft model out of a target: some of its own layers, its embeddings, and its own texts to learn from.

    pearl distill --config configs/distill/smollm2-135m.yaml
    pearl distill --config configs/distill/smollm2-135m-pard.yaml      one that guesses several tokens in one forward

The student is an ordinary transformers model. What is saved leaves out the embeddings, which are the target's, and adds
what brings them back (`pearl.checkpoints.shared_embeddings`); `--draft PATH` then loads it like any other model, and
`--whole DIR` writes a folder that needs nothing of ours.
"""

from __future__ import annotations

from pathlib import Path

from pearl.checkpoints.preflight import preflight
from pearl.checkpoints.targets import load_plain
from pearl.config.engine_config import EngineConfig
from pearl.models.fingerprint import model_fingerprint
from pearl.training import loop
from pearl.training.first_weights import spare_token
from pearl.training.objective import filled, frequent
from pearl.training.recipes import DistillRecipe
from pearl.training.shards import Recorded
from pearl.training.students.cut import go_on_from, student_of
from pearl.training.students.one_pass import OnePassStudent
from pearl.training.students.student import Student


def run(recipe: DistillRecipe, whole: str | None = None) -> None:
    """Distils by a recipe and says what came of it. `whole`: a folder for the model with its embeddings. Raises
    `UsageError`."""
    accelerator = loop.accelerator_of(recipe)
    data = Recorded(Path(recipe.data), features=bool(recipe.match and recipe.match_after))
    checked = preflight(EngineConfig(target=recipe.target, dtype="float32"))
    target = load_plain(checked, str(accelerator.device))
    fingerprint = model_fingerprint(target)
    data.must_be_of(fingerprint, recipe.target)
    train, held_out = data.split(recipe.held_out)
    rows = target.get_output_embeddings().weight.shape[0]
    vocabulary = frequent(map(data.choices, train), recipe.vocabulary, checked.tokenizer.all_special_ids, rows)
    vocabulary = filled(vocabulary, recipe.vocabulary, checked.vocabulary)  # the head is the target's
    student = student_of(target, recipe.layers)
    if recipe.start:
        go_on_from(student, recipe.start, recipe.layers, fingerprint)
    del target
    if recipe.one_pass > 1:
        token = spare_token(checked.tokenizer, student.config.get_text_config().vocab_size)
        learner: Student = OnePassStudent(student, data, vocabulary, recipe, fingerprint, token)
    else:
        learner = Student(student, data, vocabulary, recipe, fingerprint)
    loop.train(learner, recipe, train, held_out, accelerator)
    if accelerator.is_main_process and whole:
        learner.complete()
        student.bfloat16().save_pretrained(whole)
        checked.tokenizer.save_pretrained(whole)
        print(f"the whole model is in {whole}")

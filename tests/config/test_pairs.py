"""The registry says only what it can keep, and refuses the rest in a sentence."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from pearl.commands.pairs import main
from pearl.config import pairs
from pearl.config.engine_config import SHIPPED
from pearl.config.pairs import BYTES, Machine, Pair, all_pairs, check, load_pair, needed_gb
from pearl.errors import UsageError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = sorted(file.stem for file in (CONFIGS / "pairs").glob("*.yaml"))
FACTS = dict(name="mine", target="t", draft="d", dtype="float32", prompt="chat", target_gb=10, draft_gb=1.0)
ROOMY = Machine(ram_gb=1000.0)
TINY = Machine(ram_gb=0.5)


def write(folder: Path, **changes: object) -> str:
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(FACTS | changes))
    return str(file)


@pytest.mark.parametrize("name", NAMES)
def test_every_file_of_the_registry_is_the_pair_it_is_named_after(name):
    pair = load_pair(name)
    assert pair.name == name
    assert pair.note and pair.source
    assert 0 <= pair.draft_gb < pair.target_gb


@pytest.mark.parametrize("name", NAMES)
def test_every_file_names_a_licence_and_claims_no_run_of_ours_that_was_not(name):
    pair = load_pair(name)
    assert pair.licence and pair.note.startswith("Not run on our machines.") is not name.startswith("smollm2-135m")


@pytest.mark.parametrize("name", NAMES)
def test_the_gigabytes_of_a_file_are_its_parameters_times_their_width(name):
    pair = load_pair(name)
    for role, gb, kind in (
        ("target", pair.target_gb, pair.load_in or pair.dtype),
        ("draft", pair.draft_gb, pair.draft_load_in or pair.dtype),
    ):
        stated = re.search(rf"{role} ([\d.]+) billion", pair.source)
        if stated:
            assert gb == pytest.approx(float(stated[1]) * BYTES[kind], rel=0.03, abs=0.01)
        assert stated or gb == 0 or "Parameters" not in pair.source


def test_a_model_has_one_size_in_all_files():
    sizes: dict[tuple[str, str], set[float]] = {}
    for pair in all_pairs():
        sizes.setdefault((pair.target, pair.load_in or pair.dtype), set()).add(pair.target_gb)
        sizes.setdefault((pair.draft, pair.draft_load_in or pair.dtype), set()).add(pair.draft_gb)
    assert {model: found for model, found in sizes.items() if max(found) > 1.01 * min(found)} == {}


def test_no_folder_of_the_users_takes_the_place_of_the_registry(tmp_path, monkeypatch):
    (tmp_path / "configs" / "pairs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert [pair.name for pair in all_pairs()] and load_pair("smollm2-135m").name == "smollm2-135m"


def test_the_registry_is_listed_whole_and_smallest_first():
    listed = all_pairs()
    assert sorted(pair.name for pair in listed) == NAMES
    assert listed[0].name == "smollm2-135m-ngram"
    assert [p.target_gb + p.draft_gb for p in listed] == sorted(p.target_gb + p.draft_gb for p in listed)


def test_the_default_pair_and_its_variants_need_no_download():
    names = ("smollm2-135m", "smollm2-135m-feature", "smollm2-135m-ngram")
    drafts = [load_pair(name).draft for name in names]
    assert drafts == ["smollm2-135m-draft", "feature:smollm2-135m-feature", "suffix"]
    assert {load_pair(name).target for name in names} == {"smollm2-135m"}
    for name in ("smollm2-135m-draft", "smollm2-135m-feature"):
        assert (SHIPPED / name).is_dir()


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("self-")])
def test_self_speculation_drafts_with_a_smaller_copy_of_its_own_target(name):
    pair = load_pair(name)
    assert pair.draft == pair.target
    assert (pair.load_in, pair.draft_load_in) == (None, "4bit")


def test_no_pair_crosses_vocabularies_known_to_differ():
    for pair in all_pairs():
        assert "CodeLlama-34b" not in pair.target  # 32000 tokens against the 32016 of 7B
        if "TinyLlama" in pair.draft:
            assert "Llama-2-" in pair.target


def test_a_file_of_ones_own_is_a_pair_like_any_other(tmp_path):
    mine = load_pair(write(tmp_path))
    assert mine == Pair(**FACTS)
    assert (mine.load_in, mine.note) == (None, "")
    assert isinstance(mine.target_gb, float)


def test_no_pair_is_the_nearest_to_a_word_that_is_like_none():
    with pytest.raises(UsageError, match=r"^there is no pair 'nope'; `pearl pairs` lists them"):
        load_pair("nope")


def test_an_unknown_pair_is_refused_with_the_nearest_name_and_the_list():
    with pytest.raises(UsageError, match=r"'qwen2.5-0.5b-8b'.*'qwen2.5-0.5b-7b'.*pearl pairs"):
        load_pair("qwen2.5-0.5b-8b")


def test_a_pair_of_ones_own_needs_a_target_and_a_draft_only(tmp_path):
    file = tmp_path / "my-pair.yaml"
    file.write_text("target: org/large\ndraft: org/small\n")
    mine = load_pair(str(file))
    assert (mine.name, mine.dtype, mine.prompt, mine.target_gb) == ("my-pair", "bfloat16", None, None)
    fit = check(mine, ROOMY)
    assert fit.fits and fit.verdict == (
        "How much memory my-pair needs is not known: state target_gb and draft_gb in its file."
    )


def test_the_size_of_models_on_this_machine_need_not_be_stated(tmp_path):
    for name, size in (("target", 3_000), ("draft", 1_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"0" * size)
    mine = Pair(name="x", target=str(tmp_path / "target"), draft=str(tmp_path / "draft"))
    (place,) = check(mine, ROOMY).places
    assert place.need_gb == pytest.approx(needed_gb(3e-6) + needed_gb(1e-6))
    (place,) = check(Pair(name="x", target=str(tmp_path / "target"), draft="ngram"), ROOMY).places
    assert place.need_gb == pytest.approx(needed_gb(3e-6))


@pytest.mark.parametrize("kind, width", [("float32", 4), ("bfloat16", 2)])
def test_files_count_as_what_they_become_when_they_are_loaded(tmp_path, kind, width):
    """A GGUF file of few bits is unpacked; weights that lie there in another dtype are converted."""
    numbers = np.zeros((64, 32), np.float16)
    save_file({"a": numbers, "b": numbers}, tmp_path / "model.safetensors")
    save_file({"a": numbers, "b": numbers}, tmp_path / "consolidated.safetensors")
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "llama")
    few_bits = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("a", gguf.quantize(numbers.astype(np.float32), few_bits), raw_dtype=few_bits)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    for target, count in ((tmp_path, 2 * numbers.size), (tmp_path / "small.gguf", numbers.size)):
        (place,) = check(Pair(name="x", target=str(target), draft="suffix", dtype=kind), ROOMY).places
        assert place.need_gb == pytest.approx(needed_gb(count * width / 1e9))
    (place,) = check(Pair(name="x", target=str(tmp_path), draft="suffix", load_in="4bit"), ROOMY).places
    assert place.need_gb == pytest.approx(needed_gb(2 * numbers.size * 0.7 / 1e9))


def test_an_unknown_key_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(UsageError, match=r"unknown key 'traget'; did you mean target\?"):
        load_pair(write(tmp_path, traget="x"))


@pytest.mark.parametrize(
    "changes, wanted",
    [
        (dict(target_gb="big"), "target_gb must be a number of GB, not 'big'"),
        (dict(draft_gb=True), "draft_gb must be a number of GB, not True"),
        (dict(draft_gb=-1), "draft_gb must be a number of GB, not -1"),
        (dict(target_gb=float("nan")), "target_gb must be a number of GB, not nan"),
        (dict(draft_gb=10**400), "draft_gb must be a number of GB, not"),
        (dict(target=7), "target must be text, not 7"),
        (dict(target=None), "target must be text, not None"),
        (dict(load_in="2bit"), "load_in '2bit' is unknown; choose from 8bit, 4bit"),
        (
            dict(dtype="bf16"),
            r"dtype 'bf16' is unknown; choose from .*; did you mean bfloat16\?",
        ),
        (dict(prompt=["chat"]), r"prompt \['chat'\] is unknown; choose from completion, chat"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_what_it_must_be(tmp_path, changes, wanted):
    with pytest.raises(UsageError, match=wanted):
        load_pair(write(tmp_path, **changes))


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("name: [", "is not YAML"),
        ("just words", "must be a mapping"),
        ("", "must be a mapping"),
        ("name: x", "add target, draft"),
    ],
)
def test_a_file_that_is_no_pair_is_refused(tmp_path, text, wanted):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=wanted):
        load_pair(str(file))


def test_a_path_to_nothing_is_refused(tmp_path):
    with pytest.raises(UsageError, match="can't be read"):
        load_pair(str(tmp_path / "absent.yaml"))


def test_weights_need_a_fifth_and_a_gigabyte_more_and_none_need_nothing():
    assert needed_gb(10.0) == pytest.approx(13.0)
    assert needed_gb(0.0) == 0.0


@pytest.mark.parametrize(
    "machine, fits, where",
    [
        (Machine(15.3, ()), True, ["in RAM"]),
        (Machine(15.1, ()), False, ["in RAM"]),
        (Machine(0.0, (15.3,)), True, ["on the GPU"]),
        (Machine(999.0, (15.1,)), False, ["on the GPU"]),
        (Machine(0.0, (13.1, 2.3)), True, ["on GPU 0", "on GPU 1"]),
        (Machine(0.0, (2.3, 13.1)), False, ["on GPU 0", "on GPU 1"]),
        (Machine(0.0, (13.1, 2.1)), False, ["on GPU 0", "on GPU 1"]),
        (Machine(0.0, (13.1, 9.0, 2.3)), True, ["on GPU 0", "on GPU 2"]),
        (Machine(0.0, (7.0, 7.0, 2.3)), True, ["on GPUs 0-1", "on GPU 2"]),
        (Machine(0.0, (6.0, 6.0, 9.0)), False, ["on GPUs 0-1", "on GPU 2"]),
    ],
)
def test_the_target_goes_to_the_first_gpus_and_the_draft_to_the_last(machine, fits, where):
    fit = check(Pair(**FACTS), machine)  # the target needs 13.0 GB, the draft 2.2
    assert [place.where for place in fit.places] == where
    assert fit.fits is fits


def test_a_machine_too_small_is_told_how_much_is_needed_and_how_much_is_free():
    fit = check(load_pair("llama3-1b-8b"), Machine(ram_gb=8.0, gpus_gb=(16.0, 12.0)))
    assert not fit.fits
    assert fit.verdict == (
        "llama3-1b-8b does not fit: it needs 20.3 GB for the target (16.0 GB free on GPU 0) and 4.0 GB for the draft "
        "(12.0 GB free on GPU 1); `pearl pairs` shows which pairs fit here."
    )


def test_this_machine_has_memory():
    assert pairs.probe().ram_gb > 0


def test_the_command_exits_0_where_a_pair_fits_and_1_where_it_does_not(monkeypatch, capsys):
    monkeypatch.setattr(pairs, "probe", lambda: ROOMY)
    assert main(["smollm2-135m"]) == 0
    assert capsys.readouterr().out.startswith("smollm2-135m fits: it needs 2.4 GB")
    monkeypatch.setattr(pairs, "probe", lambda: TINY)
    assert main(["smollm2-135m"]) == 1
    assert "does not fit" in capsys.readouterr().out


def test_the_command_exits_2_on_bad_input_with_the_reason_on_standard_error(capsys):
    assert main(["smollm"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1


def test_on_a_narrow_terminal_the_names_are_still_whole(monkeypatch, capsys):
    monkeypatch.setattr(pairs, "probe", lambda: Machine(ram_gb=30.0))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")  # of 80 columns
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert {line.split()[0] for line in lines} >= set(NAMES)


def test_the_list_names_every_pair_unbroken(monkeypatch, capsys):
    monkeypatch.setattr(pairs, "probe", lambda: Machine(ram_gb=30.0))
    assert main([]) == 0
    lines = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]}
    assert sorted(lines) == NAMES
    assert (lines["smollm2-135m"], lines["llama2-7b-70b"]) == ("yes", "no")


@pytest.mark.parametrize("file", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_launch_is_two_processes_by_the_type_that_torchrun_starts(file):
    config = yaml.safe_load(file.read_text())
    assert (config["num_processes"], config["distributed_type"]) == (2, "MULTI_GPU")


@pytest.mark.slow
def test_the_cpu_launch_really_starts_two_processes_that_see_no_gpu(tmp_path):
    pytest.importorskip("accelerate")
    script = tmp_path / "who.py"
    script.write_text(
        "import os, pathlib, sys\n"
        "rank, world, gpus = (os.environ[key] for key in ('RANK', 'WORLD_SIZE', 'CUDA_VISIBLE_DEVICES'))\n"
        "pathlib.Path(sys.argv[1], rank + '.rank').write_text(f'{world} {gpus}')\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / "accelerate" / "cpu.yaml"]
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    subprocess.run([*launch, script, tmp_path], check=True, env=clean, timeout=120, capture_output=True)
    assert {file.stem: file.read_text() for file in tmp_path.glob("*.rank")} == {"0": "2 -1,-1", "1": "2 -1,-1"}


def test_what_drafts_in_the_targets_process_is_part_of_a_pair_and_of_what_it_needs():
    plain = Pair(name="x", target="smollm2-135m", draft="suffix", target_gb=1.0)
    head = replace(plain, target_draft="auto,feature:smollm2-135m-feature")
    (mine,), (more,) = (check(pair, ROOMY).places for pair in (plain, head))
    assert 0.01 < more.need_gb - mine.need_gb < 0.2

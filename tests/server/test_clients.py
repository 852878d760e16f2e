"""Programs that people point at a server: each installs from PyPI, and works here as it does with any other.

They are in the extra `clients`. One that is not installed is skipped, and says so.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import servers
from servers import Served

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache")]
LENGTH = 400
PROMPT = "the thing"


@pytest.fixture(scope="module")
def server(pair) -> Iterator[Served]:
    with servers.engine(*pair, max_length=LENGTH, max_sequences=4) as engine, servers.served(engine) as one:
        yield one


def needs(package: str) -> Any:
    found = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not found, reason=f"{package} is not installed: pip install 'pearl[clients]'")


def run(*command: str, cwd: Path, within_s: float = 900, **environment: str) -> str:
    """What a program says. It sees one core, and no plugin of others."""
    known = os.environ | {"LLM_LOAD_PLUGINS": "", "OMP_NUM_THREADS": "1", "COLUMNS": "200"} | environment
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=known, capture_output=True, text=True, timeout=within_s
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@needs("llm")
def test_llm_asks_and_lists(server, tmp_path):
    base = ("-m", "llm", "openai", "endpoint", f"{server.url}/v1")
    home = {"LLM_USER_PATH": str(tmp_path)}
    assert run(*base, "--models", cwd=tmp_path, **home).split() == ["tiny"]
    said = run(*base, PROMPT, "-m", "tiny", "-o", "max_tokens", "12", "-o", "temperature", "0", cwd=tmp_path, **home)
    engine = server.service.engine
    expected = engine.chat([{"role": "user", "content": PROMPT}], servers.greedy(12)).text
    assert said.strip() == expected.strip() and expected


@needs("langchain_openai")
def test_langchain_invokes_and_streams(server):
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        model="tiny",
        max_completion_tokens=12,
        temperature=0,
        max_retries=0,
    )
    expected = server.service.engine.chat([{"role": "user", "content": PROMPT}], servers.greedy(12)).text
    assert model.invoke(PROMPT).content == expected
    assert "".join(str(part.content) for part in model.stream(PROMPT)) == expected
    assert [one.content for one in model.batch([PROMPT] * 3)] == [expected] * 3


TASKS = {
    "choices": """\
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 1
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "rolling": """\
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "written": """\
task: written
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["x", "!", "a", "b", "c", "d"], max_gen_toks: 12, temperature: 0.0, do_sample: false}
metric_list: [{metric: exact_match}, {metric: bleu}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    lines = [
        {
            "question": f"the thing {number} in the",
            "choices": [f" thing {number}", " he", f"the in{number}", "  in the"],
        }
        for number in range(12)
    ]
    (folder / "docs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(task.replace("FILE", str(folder / "docs.jsonl")))
    return folder


PROGRAM = """\
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

folder, out, asked = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
found = []
for one in asked:
    manager = TaskManager(include_path=folder, include_defaults=False)
    found.append(simple_evaluate(**one, task_manager=manager, log_samples=True, batch_size=1, bootstrap_iters=0))
kept = [{"results": one["results"], "samples": one["samples"]} for one in found]
open(out, "w").write(json.dumps(kept, default=str))
"""


def evaluated(tasks: Path, out: Path, *asked: dict[str, Any]) -> list[dict[str, Any]]:
    """What lm-eval finds: its figures, and the samples of each task."""
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "hub")}
    run("-c", PROGRAM, str(tasks), str(out / "found.json"), json.dumps(asked), cwd=out, **offline)
    found: list[dict[str, Any]] = json.loads((out / "found.json").read_text())
    return found


def own(pair: tuple[str, str]) -> dict[str, Any]:
    """Its own transformers backend."""
    return {"model": "hf", "device": "cpu", "model_args": f"pretrained={pair[0]},dtype=float32,max_length={LENGTH}"}


def near(ours: Any, theirs: Any) -> bool:
    """Figures to 1e-3 (of a large perplexity to that part of it), all else the same."""
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(near(ours[key], theirs[key]) for key in ours)
    return ours == pytest.approx(theirs, abs=1e-3, rel=1e-3) if isinstance(ours, float) else ours == theirs


@needs("lm_eval")
def test_lm_eval_finds_the_figures_of_its_own_backend(server, pair, tasks, tmp_path):
    address = f"model=tiny,base_url={server.url}/v1/completions,max_length={LENGTH}"
    served = {"model": "local-completions", "model_args": f"{address},num_concurrent=2,tokenizer={pair[0]}"}
    remote = {"model": "local-completions", "model_args": f"{address},tokenizer_backend=remote", "tasks": ["choices"]}
    ours, theirs, without = evaluated(
        tasks, tmp_path, served | {"tasks": [*TASKS]}, own(pair) | {"tasks": [*TASKS]}, remote
    )
    assert near(ours["results"], theirs["results"])
    assert near(without["results"]["choices"], ours["results"]["choices"]), "it needs no tokenizer of its own"
    for task in TASKS:
        for mine, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert mine["doc"] == other["doc"]
            if task == "written":
                assert mine["resps"] == other["resps"]
            elif task == "choices":
                for (p, best), (their_p, their_best) in zip(
                    mine["filtered_resps"], other["filtered_resps"], strict=True
                ):
                    assert float(p) == pytest.approx(float(their_p), abs=1e-3) and best == their_best


@needs("lm_eval")
def test_lm_eval_s_chat_is_that_of_its_own_backend(server, pair, tasks, tmp_path):
    served = {"model": "local-chat-completions", "model_args": f"model=tiny,base_url={server.url}/v1/chat/completions"}
    more = {"tasks": ["written"], "apply_chat_template": True}
    ours, theirs = evaluated(tasks, tmp_path, served | more, own(pair) | more)
    for mine, other in zip(ours["samples"]["written"], theirs["samples"]["written"], strict=True):
        assert mine["resps"] == other["resps"]


@needs("guidellm")
def test_guidellm_measures(server, pair, tmp_path):
    run(
        *("-m", "guidellm", "run", "--backend", f"kind=openai_http,target={server.url},model=tiny"),
        *("--profile", "kind=concurrent,streams=3", "--constraint", "kind=max_requests,count=12"),
        *("--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=8"),
        *("--tokenizer", f"kind=huggingface_auto,model={pair[0]}"),
        *("--output", f"kind=json,path={tmp_path / 'out.json'}", "--disable-console-interactive"),
        cwd=tmp_path,
    )
    totals = json.loads((tmp_path / "out.json").read_text())["benchmarks"][0]["metrics"]["request_totals"]
    assert totals["successful"] >= 12 and totals["errored"] == 0


@needs("schemathesis")
def test_whatever_is_asked_no_answer_is_one_that_the_schema_does_not_name(pair, tmp_path):
    """`PEARL_EXAMPLES=1900` asks ten thousand times, by all of its ways."""
    examples = os.environ.get("PEARL_EXAMPLES")
    phases = "examples,coverage,fuzzing" if examples else "fuzzing"
    with servers.engine(*pair, max_length=40) as engine, servers.served(engine) as one:
        said = run(
            *("-m", "schemathesis.cli", "run", f"{one.url}/openapi.json", "--phases", phases),
            *("--checks", "not_a_server_error,status_code_conformance", "--max-examples", examples or "25"),
            *("--request-timeout", "600"),
            *("--seed", "1", "--no-color", "--suppress-health-check", "all", "--generation-database", "none"),
            cwd=tmp_path,
            within_s=7200 if examples else 900,
        )
    print(said[-2000:])  # how many cases there were

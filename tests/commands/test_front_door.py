"""`pearl` answers at once, knows its commands, and says what is wrong with a command line in one sentence."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time

import pytest

from pearl import __main__ as front
from pearl import __version__
from pearl.commands import eval
from pearl.config import cli
from pearl.config.commands import COMMANDS
from pearl.evaluation import eval_config

EVALS = [f"eval {name}" for name in eval.BENCHMARKS]


def pearl(*words: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pearl", *words]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def parser_of(command: str) -> cli.Parser:
    name, _, benchmark = command.partition(" ")
    if benchmark:
        return eval_config.parser(eval.benchmark(benchmark))
    return importlib.import_module(COMMANDS[name][0]).parser()


def refusal(capsys: pytest.CaptureFixture, *words: str) -> str:
    """The sentence with which a command line is refused."""
    assert front.main(words) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1
    return err.removeprefix("error: ").rstrip()


def test_the_help_is_there_before_one_notices():
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        done = pearl("--help")
        taken.append(time.perf_counter() - began)
        assert done.returncode == 0
    assert min(taken) < 0.3
    for name, (_, about) in COMMANDS.items():
        assert f"  {name:10} {about}" in done.stdout


def test_what_it_knows_of_torch_is_nothing_until_a_command_runs():
    code = "import sys, runpy; sys.argv = ['pearl', *sys.argv[1:]]\ntry: runpy.run_module('pearl', run_name='__main__')"
    code += "\nexcept SystemExit: print(*sys.modules.keys() & {'torch', 'transformers', 'matplotlib', 'rich', 'yaml'})"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""


def test_no_command_loads_torch_to_show_its_options():
    code = """
import sys
from pearl.__main__ import main
for command in sys.argv[1:]:
    try:
        main([*command.split(), "--help"])
    except SystemExit:
        print("loaded", command, *sys.modules.keys() & {"torch", "transformers", "matplotlib"})
"""
    commands = [*COMMANDS, "eval humaneval"]
    done = subprocess.run([sys.executable, "-c", code, *commands], capture_output=True, text=True, check=True)
    said = [line for line in done.stdout.splitlines() if line.startswith("loaded")]
    assert said == [f"loaded {command}" for command in commands]


@pytest.mark.parametrize("command", [*COMMANDS, *EVALS])
def test_every_command_shows_what_it_does_with_an_example(command: str):
    text = parser_of(command).format_help()
    assert text.startswith(f"usage: pearl {command}")
    assert f"  pearl {command}" in text.partition("example")[2]
    for action in parser_of(command)._actions:
        assert action.help, action.dest


def test_it_says_which_pearl_it_is():
    assert pearl("--version").stdout == f"pearl {__version__}\n"


def test_without_a_command_it_lists_them(capsys):
    assert front.main([]) == 2
    assert "pearl COMMAND [options]" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["pair"], "There is no command 'pair'; did you mean pairs? `pearl --help` lists them."),
        (["xyzzy"], "There is no command 'xyzzy'. `pearl --help` lists them."),
        (["eval", "humanevl"], "There is no benchmark 'humanevl'; did you mean humaneval?"),
        (["eval", "--limit", "20", "gsm8k"], "The benchmark comes first, and options behind it: pearl eval gsm8k"),
        (["eval", "--wide", "gsm8k"], "The benchmark comes first, and options behind it: pearl eval gsm8k"),
        (["chat", "--quantization", "8bit"], "There is no option --quantization; did you mean --load-in?"),
        (["eval", "gsm8k", "--max-tokens", "5"], "There is no option --max-tokens; did you mean --max-new-tokens?"),
        (["eval", "gsm8k", "--max-tokens=5"], "There is no option --max-tokens; did you mean --max-new-tokens?"),
        (["doctor", "--no-model"], "There is no option --no-model; did you mean --no-models?"),
        (["doctor", "--limit", "3"], "There is no option --limit."),
        (["selfcheck", "--draft", "x"], "There is no option --draft"),
        (["pairs", "a", "b"], "'b' has no meaning here. `pearl pairs --help` lists what there is."),
        (["chat", "--target-tp", "2"], "The option --target-tp is called --tensor-parallel-size now."),
        (["chat", "--width", "2"], "The option --width is called --max-verify-tokens now."),
        (["chat", "--max-ahead", "2"], "The option --max-ahead is called --max-draft-tokens now."),
        (["chat", "--branches", "2"], "The option --branches is called --draft-batch now."),
        (["chat", "--draft-beam", "2"], "The option --draft-beam is called --tree-top-k now."),
        (["chat", "--eager"], "The option --eager is called --cuda-graphs (auto, on, off or static-only) now."),
        (["chat", "--static=on"], "The option --static is called --cuda-graphs (auto, on, off or static-only) now."),
        (["chat", "--silence-s", "2"], "The option --silence-s is called --heartbeat-timeout-s now."),
        (["chat", "--draft-deadline-s", "2"], "The option --draft-deadline-s is called --draft-timeout-s now."),
        (["chat", "--draft-restarts", "2"], "The option --draft-restarts is called --max-draft-restarts now."),
        (
            ["chat", "--feature-lane", "on"],
            "The option --feature-lane is called --feature-transport (auto, on or off) now.",
        ),
        (["chat", "--draft-vocabulary", "9"], "The option --draft-vocabulary is called --debug-draft-vocabulary now."),
        (
            ["chat", "--dtype", "bf16"],
            "--dtype 'bf16' is unknown; choose from float32, bfloat16, float16; did you mean bfloat16?",
        ),
        (["chat", "--max-new-tokens", "many"], "--max-new-tokens must be a whole number from 1, not 'many'."),
        (["chat", "--gamma", "-3"], "--gamma must be a whole number from 0 to 64, or auto, not -3."),
        (["chat", "--cache-gb", "nan"], "--cache-gb must be a number of gigabytes up to 1,000,000, or 0, not nan."),
        (["chat", "--mode", "pearl", "tree"], "A talk has one mode: name one of pearl, tree with --mode."),
        (["chat", "--mode", "perl"], "There is no mode 'perl'; did you mean pearl?"),
        (["score"], "Give texts, --draft (see `pearl score --help`)"),
        (["score", "t", "--draft", "d", "--batch-size", "0"], "--batch-size must be at least 1, not 0 (see"),
        (["theory", "x"], "'x' has no meaning here."),
        (["completion", "fish"], "shell: invalid choice: 'fish'"),
    ],
)
def test_a_wrong_command_line_is_refused_in_a_sentence(capsys, words, sentence):
    assert refusal(capsys, *words).startswith(sentence)


# completion


def completed(shell: str, line: str, tmp_path) -> set[str]:
    """What bash offers at the end of a line."""
    script = tmp_path / "pearl.bash"
    if not script.exists():
        done = pearl("completion", shell)
        assert done.returncode == 0, done.stderr
        script.write_text(done.stdout)
    words = line.split(" ")
    ask = f"""
        source {script}
        COMP_WORDS=({" ".join(f"'{word}'" for word in words)}); COMP_CWORD={len(words) - 1}
        $(complete -p pearl | sed -E 's/.*-F ([^ ]+).*/\\1/')
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_bash_completes_commands_data_sets_and_options(tmp_path):
    assert completed("bash", "pearl ", tmp_path) >= {*COMMANDS, "completion"}
    assert completed("bash", "pearl eval ", tmp_path) >= set(eval.BENCHMARKS)
    assert completed("bash", "pearl chat --max-n", tmp_path) == {"--max-new-tokens"}
    assert "--resume" in completed("bash", "pearl eval mt-bench --res", tmp_path)


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_a_script_too(shell):
    assert "max-new-tokens" in pearl("completion", shell).stdout


def test_a_reader_who_has_seen_enough_meets_no_traceback():
    """`pearl completion bash | true`: what the pipe can't hold is written after its other end is closed."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "pearl", "completion", "bash"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(writing)
    assert done.returncode == 1 and done.stderr == ""

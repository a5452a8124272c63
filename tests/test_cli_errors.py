"""What goes wrong on the command line: one line, an exit code, and a traceback only on request."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from llava_deploy.runtime import Llava

Invoke = Callable[..., Result]
ErrorLine = Callable[[Result], str]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (["rum"], 2, "No such command 'rum'"),
        (["--nope"], 2, "No such option '--nope'"),
        (["run", "BUNDLE"], 2, "Missing option '--prompt'. See: llava-deploy run --help"),
        (["run", "BUNDLE", "--prompt", "x", "--top-k", "y"], 2, "'y' is not a valid integer"),
        (["run", "BUNDLE", "--prompt", "x", "--temperature", "-1"], 2, "error: --temperature: want"),
        (["run", "BUNDLE", "--prompt", "x", "--max-new-tokens", "0"], 2, "error: --max-new-tokens: want"),
        (["run", "BUNDLE", "--prompt", "x", "--max-len", "9999999", "-q"], 2, "error: --max-len: want"),
        (
            ["run", "BUNDLE", "--prompt", "x", "--threads", "0"],
            2,
            "error: --threads: want 1 to 1024, got 0; leave it out",
        ),
        (
            ["run", "BUNDLE", "--prompt", "x", "--top-k", "0"],
            2,
            "error: --top-k: want a whole number, 1 or more, got 0",
        ),
        (["run", "BUNDLE", "--prompt", "x", "--top-p", "2"], 2, "error: --top-p: want"),
        (["run", "BUNDLE", "--prompt", "x", "--repetition-penalty", "0"], 2, "error: --repetition-penalty: want"),
        (["chat", "BUNDLE", "--seed", "-1"], 2, "error: --seed: want a whole number, 0 or more, got -1; leave it out"),
        (["eval", "BUNDLE", "--batch", "0"], 2, "error: --batch: want"),
        (["run", "BUNDLE", "--prompt", "x", "--image", "nowhere.png"], 2, "nowhere.png"),
        (["run", "BUNDLE", "--prompt", "<image>", "-q"], 2, "placeholder"),
        (["run", "nowhere", "--prompt", "x"], 2, "llava-deploy export"),
        (["build", "nowhere"], 2, "llava-deploy export"),
        (["inspect", "nowhere"], 2, "config.json"),
        (["export", "nowhere", "-o", "out"], 2, "config.json"),
        (["export", "CHECKPOINT", "-o", "BUNDLE"], 2, "--force"),
        (["export", "CHECKPOINT", "-o", "out", "--precision", "fp8"], 2, "'fp32', 'fp16'"),
        (["export", "CHECKPOINT", "-o", "out", "--conversation", "klingon"], 2, "vicuna_v1"),
        (["eval", "BUNDLE", "--per-kind", "0"], 2, "per-kind: want"),
        (["eval", "BUNDLE", "--data", "nowhere.jsonl"], 2, "nowhere.jsonl"),
        (["eval", "BUNDLE", "--data", "nowhere.jsonl", "--seed", "3"], 2, "--seed: of no effect with --data"),
        (["inspect", "BUNDLE", "--lora", "adapter"], 2, "--lora: of no effect on a bundle"),
        (["export", "CHECKPOINT", "-o", "out", "--accuracy-level", "1"], 2, "--accuracy-level: of no effect with"),
        (["export", "CHECKPOINT", "-o", "out", "--lm-head", "int8"], 2, "--lm-head: of use with --precision int4"),
        (["export", "CHECKPOINT", "-o", "out", "--precision", "int4-awq"], 2, "error: --calibration: want"),
        (["export", "CHECKPOINT", "-o", "out", "--precision", "int4", "--group-size", "48"], 2, "--group-size: want"),
        (["build", "BUNDLE", "--accuracy-level", "1"], 2, "--accuracy-level: want a bundle of int4 weights"),
        (["completion", "tcsh"], 2, "'bash', 'zsh', 'fish'"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    exit_code: int,
    said: str,
    invoke: Invoke,
    error_line: ErrorLine,
    demo_bundle: Path,
    demo_checkpoint: Path,
) -> None:
    places = {"BUNDLE": str(demo_bundle), "CHECKPOINT": str(demo_checkpoint)}
    result = invoke(*(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == exit_code
    assert said in error_line(result)
    assert "None" not in error_line(result)
    assert result.stdout == ""


@pytest.mark.parametrize("arguments", [["--debug", "build", "nowhere"], ["build", "nowhere", "--debug"]])
def test_debug_shows_the_traceback(arguments: list[str], invoke: Invoke) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: nowhere")


@pytest.mark.parametrize(
    ("raised", "exit_code", "said"),
    [
        (
            RuntimeError("two\nlines"),
            1,
            "error: RuntimeError: two lines (a bug in llava-deploy: run it again with --debug",
        ),
        (MemoryError(), 1, "too little memory"),
        (PermissionError(13, "Permission denied", "there"), 1, "error: there: Permission denied"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 1, "pip install 'llava-deploy[export]'"),
        (ModuleNotFoundError("No module named 'x'", name="x"), 1, "a bug in llava-deploy"),
    ],
)
def test_what_goes_wrong_inside_is_one_line(
    raised: Exception,
    exit_code: int,
    said: str,
    invoke: Invoke,
    error_line: ErrorLine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(Llava, "load", fail)
    result = invoke("run", "bundle", "--prompt", "x")
    assert result.exit_code == exit_code
    assert said in error_line(result)


def test_ctrl_c_exits_130(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Llava, "load", interrupt)
    result = invoke("run", "bundle", "--prompt", "x")
    assert (result.exit_code, result.stderr.strip()) == (130, "")


def test_a_missing_extra_is_named(demo_checkpoint: Path, child_environment: dict[str, str]) -> None:
    arguments = ["export", str(demo_checkpoint), "-o", "never"]
    code = f"import sys; sys.modules['onnx_ir'] = None\nfrom llava_deploy.cli import main; main({arguments!r})"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=child_environment
    )
    assert found.returncode == 1
    wanted = "error: this needs onnx_ir, which is not installed; install it with: pip install 'llava-deploy[export]'\n"
    assert found.stderr == wanted


def test_a_closed_pipe_is_quiet(demo_bundle: Path, child_environment: dict[str, str]) -> None:
    arguments = ["run", str(demo_bundle), "-q", "--prompt", "Hello"]
    code = f"from llava_deploy.cli import main; main({arguments!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=child_environment
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait() != 0

"""The command line as people and scripts meet it: output, errors, exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from llava_deploy.cli import main
from llava_deploy.exporter.demo.scenes import Example, Split, examples
from llava_deploy.exporter.verify import VerifyReport
from llava_deploy.runtime import Llava
from llava_deploy.runtime.stages import StageResult

COMMANDS = (
    *("inspect", "plan", "export", "record", "build", "verify", "run", "chat", "eval", "bench"),
    *("report", "pack", "unpack", "selftest", "doctor", "swap", "serve", "demo", "completion"),
)
PROGRAM = [sys.executable, "-c", "from llava_deploy.cli import main; main(prog_name='llava-deploy')"]

Invoke = Callable[..., Result]
ErrorLine = Callable[[Result], str]


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Example]:
    drawn = next(examples(Split.HELD_OUT))
    path = tmp_path_factory.mktemp("pictures") / "a picture.png"
    drawn.picture.save(path)
    return path, drawn


def test_every_command_is_listed_and_ends_its_help_with_an_example(invoke: Invoke) -> None:
    assert tuple(main.commands) == COMMANDS
    for command in COMMANDS:
        result = invoke(command, "--help")
        assert result.exit_code == 0
        end = result.output.split("Example:\n")[1].splitlines()
        assert end
        assert all(re.match(rf" +llava-deploy {command}\b", line) for line in end), end


def test_short_help_fits_eighty_columns(invoke: Invoke) -> None:
    listing = invoke("--help").output.split("Commands:\n")[1].split("\n\n")[0]
    assert "..." not in listing


def test_version(invoke: Invoke) -> None:
    assert re.fullmatch(r"llava-deploy, version \d+\.\d+\.\d+\n", invoke("--version").output)


def test_no_command_shows_help(invoke: Invoke) -> None:
    assert "Commands:" in invoke().output


def test_help_imports_nothing_heavy(child_environment: dict[str, str]) -> None:
    code = "import sys; from llava_deploy.cli import main; main(['--help'], standalone_mode=False); print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=child_environment
    )
    modules = set(found.stdout.splitlines()[-1].split())
    assert "llava_deploy.cli" in modules
    assert not modules & {
        "numpy",
        "rich",
        "torch",
        "onnxruntime",
        "llava_deploy.runtime.llava",
    }
    exporter = {name for name in modules if name.startswith("llava_deploy.exporter.")}
    commands = {name for name in exporter if name.startswith("llava_deploy.exporter.command_")}
    asked = "llava_deploy.exporter.quantization.request"  # what the options of export are made of
    assert commands
    assert not {name for name in exporter - commands if not asked.startswith(name)}


def test_run_needs_only_the_runtime(
    demo_bundle: Path, example: tuple[Path, Example], child_environment: dict[str, str]
) -> None:
    arguments = ["run", str(demo_bundle), "--image", str(example[0]), "--prompt", "Well?", "--max-new-tokens", "2"]
    blocked = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "rich")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
        f"from llava_deploy.cli import main; main({arguments!r})"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=child_environment
    )
    assert found.returncode == 0, found.stderr


def test_run_prints_the_answer_and_nothing_else(
    invoke: Invoke, demo_bundle: Path, example: tuple[Path, Example]
) -> None:
    path, drawn = example
    result = invoke("run", demo_bundle, "--image", path, "--prompt", drawn.question)
    assert result.exit_code == 0
    assert result.stdout == f"{drawn.answer}\n"
    assert "ONNX Runtime" in result.stderr.splitlines()[0]
    quiet = invoke("run", demo_bundle, "--image", path, "--prompt", drawn.question, "-q")
    assert (quiet.stdout, quiet.stderr) == (result.stdout, "")


def test_run_takes_a_picture_from_standard_input(
    invoke: Invoke, demo_bundle: Path, example: tuple[Path, Example]
) -> None:
    path, drawn = example
    result = invoke("run", demo_bundle, "--image", "-", "--prompt", drawn.question, stdin=path.read_bytes())
    assert result.stdout == f"{drawn.answer}\n"


def test_run_raw_takes_the_prompt_as_it_is(invoke: Invoke, demo_bundle: Path, example: tuple[Path, Example]) -> None:
    prompt = "USER: <image>\nWhat colours are there? ASSISTANT:"
    want = Llava.load(demo_bundle).generate([prompt], [[example[0]]], max_new_tokens=6)[0]
    options = ("--image", example[0], "--prompt", prompt, "--max-new-tokens", 6, "--json")
    raw = json.loads(invoke("run", demo_bundle, "--raw", *options).stdout)
    assert tuple(raw["token_ids"]) == want.token_ids
    framed = json.loads(invoke("run", demo_bundle, *options).stdout)
    assert framed["timings"]["prompt_tokens"] > raw["timings"]["prompt_tokens"]


def test_run_json_has_everything(invoke: Invoke, demo_bundle: Path, example: tuple[Path, Example]) -> None:
    path, drawn = example
    result = invoke("run", demo_bundle, "--image", path, "--prompt", drawn.question, "--json")
    value = json.loads(result.stdout)
    assert set(value) == {"token_ids", "text", "finish_reason", "timings", "decode_tokens_per_second", "backend"}
    assert (value["text"], value["finish_reason"]) == (drawn.answer, "stop")
    assert value["timings"]["new_tokens"] == len(value["token_ids"])


def test_run_says_when_an_answer_is_cut_off(invoke: Invoke, demo_bundle: Path, example: tuple[Path, Example]) -> None:
    options = ("--image", example[0], "--prompt", example[1].question)
    assert "--max-new-tokens" in invoke("run", demo_bundle, *options, "--max-new-tokens", 1).stderr
    assert (
        "context of 80 tokens is full"
        in invoke("run", demo_bundle, "--raw", "--prompt", "a" * 78, "--max-len", 80).stderr
    )


def test_sampling_with_a_seed_repeats_itself(invoke: Invoke, demo_bundle: Path) -> None:
    options = ("--prompt", "Hello", "--temperature", 5, "--top-k", 50, "--top-p", 0.99, "--max-new-tokens", 12)
    first, again, other = (invoke("run", demo_bundle, *options, "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == again != other


def test_inspect_a_bundle(invoke: Invoke, demo_bundle: Path) -> None:
    table = invoke("inspect", demo_bundle).stdout
    assert "clip_vision_model" in table
    assert "onnxruntime-" in table
    assert json.loads(invoke("inspect", demo_bundle, "--json").stdout)["model"]["precision"] == "fp32"


def test_inspect_a_checkpoint(invoke: Invoke, demo_checkpoint: Path) -> None:
    table = invoke("inspect", demo_checkpoint).stdout
    assert "mlp2x_gelu" in table
    value = json.loads(invoke("inspect", demo_checkpoint, "--json").stdout)
    assert f"{value['tensors']['parameters']:,} parameters" in table


def test_export_and_build_print_where_they_wrote(invoke: Invoke, demo_checkpoint: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    result = invoke("export", demo_checkpoint, "-o", bundle, "--precision", "fp16")
    assert (result.exit_code, result.stdout) == (0, f"{bundle}\n")
    assert f"llava-deploy build {bundle}" in result.stderr
    built = invoke("build", bundle, "-q")
    assert built.stderr == ""
    assert (Path(built.stdout.strip()) / "engine.json").is_file()


def test_int4_in_two_ways(invoke: Invoke, demo_checkpoint: Path, tmp_path: Path) -> None:
    calibration = tmp_path / "calibration.jsonl"
    calibration.write_text('{"text": "The red square is on the left."}\n{"text": "A blue circle."}\n')
    options = ("--group-size", 64, "--symmetric", "--lm-head", "int8", "--accuracy-level", 1)
    for precision, more, method in (("int4", (), "rtn"), ("int4-awq", ("--calibration", calibration), "awq")):
        bundle = tmp_path / precision
        result = invoke("export", demo_checkpoint, "-o", bundle, "--precision", precision, *options, *more)
        assert (result.exit_code, result.stdout) == (0, f"{bundle}\n"), result.stderr
        value = json.loads(invoke("inspect", bundle, "--json").stdout)
        assert value["model"]["precision"] == precision
        assert value["quantization"] == {
            "method": method, "group_size": 64, "symmetric": True, "lm_head": "int8", "weights": 29, "accuracy_level": 1
        }  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration.jsonl", "int4", "int4-awq"]


def test_eval_json(invoke: Invoke, demo_bundle: Path) -> None:
    value = json.loads(invoke("eval", demo_bundle, "--per-kind", 2, "--json").stdout)
    assert value["asked"] == 10
    assert value["right"] == 10 - len(value["wrong"])
    assert set(value["kinds"]) == set(value["chance"])


def test_eval_of_a_file(invoke: Invoke, demo_bundle: Path, example: tuple[Path, Example]) -> None:
    path, drawn = example
    data = path.parent / "questions.jsonl"
    lines = [{"image": path.name, "question": drawn.question, "answer": answer} for answer in (drawn.answer, "No.")]
    data.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    value = json.loads(invoke("eval", demo_bundle, "--data", data, "--json").stdout)
    assert (value["asked"], value["right"]) == (2, 1)
    assert value["wrong"][0]["said"] == drawn.answer
    assert "50.0%" in invoke("eval", demo_bundle, "--data", data).stdout


def test_verify_passes(invoke: Invoke, demo_checkpoint: Path, demo_bundle: Path) -> None:
    result = invoke("verify", demo_checkpoint, demo_bundle)
    assert result.exit_code == 0
    assert "out of tolerance" not in result.stdout


def test_verify_names_the_first_stage_that_differs(
    invoke: Invoke, error_line: ErrorLine, demo_checkpoint: Path, demo_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = tuple(
        StageResult(name, "decoder", error, error, 1e-4, "detail")
        for name, error in (("first", 1e-5), ("second", float("nan")), ("third", 1.0))
    )
    report = VerifyReport("backend", "prompt", stages)
    monkeypatch.setattr("llava_deploy.exporter.verify.verify", lambda *_, **__: report)
    result = invoke("verify", demo_checkpoint, demo_bundle)
    assert result.exit_code == 1
    assert error_line(result) == "error: second is the first stage out of tolerance"
    failed = [line.split()[0] for line in result.stdout.splitlines() if "out of tolerance" in line]
    assert failed == ["second", "third"]
    value = json.loads(invoke("verify", demo_checkpoint, demo_bundle, "--json").stdout)
    assert value["first_failure"] == "second"


def test_chat_over_a_pipe(invoke: Invoke, demo_bundle: Path, example: tuple[Path, Example]) -> None:
    path, drawn = example
    lines = f"{drawn.question}\n\n/reset\n/image {path}\n{drawn.question}\n/quit\nnever asked\n"
    result = invoke("chat", demo_bundle, "--image", path, "-q", stdin=lines)
    assert result.exit_code == 0
    assert result.stdout == f"{drawn.answer}\n" * 2
    assert result.stderr == ""


def test_chat_over_a_pipe_ends_at_an_error(invoke: Invoke, error_line: ErrorLine, demo_bundle: Path) -> None:
    result = invoke("chat", demo_bundle, "-q", stdin="/image nowhere.png\nnever asked\n")
    assert result.exit_code == 2
    assert "nowhere.png" in error_line(result)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, invoke: Invoke) -> None:
    assert "_LLAVA_DEPLOY_COMPLETE" in invoke("completion", shell).stdout


def test_completion_completes(child_environment: dict[str, str]) -> None:
    environment = {
        **child_environment,
        "_LLAVA_DEPLOY_COMPLETE": "bash_complete",
        "COMP_WORDS": "llava-deploy run --max",
        "COMP_CWORD": "2",
    }
    found = subprocess.run(PROGRAM, capture_output=True, text=True, check=False, env=environment)
    assert {"plain,--max-new-tokens", "plain,--max-len"} <= set(found.stdout.split())


def test_demo_goes_the_whole_way(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("demo", "-o", tmp_path)
    assert result.exit_code == 0, result.stderr
    pictures = sorted((tmp_path / "pictures").glob("*.png"))
    assert len(pictures) == 10
    assert all(str(path) in result.stdout for path in pictures)
    assert "of 10 right" in result.stdout
    assert "tokens/s" in result.stdout

"""The base install answers: in processes in which nothing of the export extra can be imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from llava_deploy.engines.engine_manifest import ENGINES
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.demo.scenes import Example, Split, examples
from llava_deploy.exporter.goldens.record import record
from llava_deploy.runtime import Llava

FORBIDDEN = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "ml_dtypes", "polygraphy", "peft")
BARRED = f"""
import importlib.abc, sys
class Bar(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FORBIDDEN!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}, the test says", name=name)
sys.meta_path.insert(0, Bar())
"""
ANSWER = """
import json
from llava_deploy.runtime import Llava
llava = Llava.load(sys.argv[1], threads=1)
answers = []
for path, question in json.loads(sys.argv[2]):
    content = [{"type": "image", "image": path}, {"type": "text", "text": question}]
    pieces = list(llava.chat([{"role": "user", "content": content}], max_new_tokens=32))
    answers.append(["".join(piece.text for piece in pieces).strip(), pieces[-1].finish_reason])
print(json.dumps(answers))
"""
COMMAND = """
from llava_deploy.cli import main
main(sys.argv[1:], prog_name="llava-deploy")
"""
QUESTIONS = 10


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Example]]:
    place = tmp_path_factory.mktemp("pictures")
    found = []
    for number, example in enumerate(islice(examples(Split.HELD_OUT, 11), QUESTIONS)):
        path = place / f"{number}.png"
        example.picture.save(path)
        found.append((path, example))
    return found


def barred(script: str, environment: dict[str, str], *args: object) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-c", BARRED + script, *map(str, args)]
    return subprocess.run(run, check=False, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.parametrize("module", [*FORBIDDEN, "torch.nn"])
def test_the_bar_holds(child_environment: dict[str, str], module: str) -> None:
    result = barred(f"import {module}", child_environment)
    assert result.returncode == 1
    assert "the test says" in result.stderr


def test_whole_answers(demo_bundle: Path, drawn: list[tuple[Path, Example]], child_environment: dict[str, str]) -> None:
    questions = json.dumps([(str(path), example.question) for path, example in drawn])
    result = barred(ANSWER, child_environment, demo_bundle, questions)
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout)
    assert {reason for _, reason in answers} == {"stop"}
    right = sum(text == example.answer for (text, _), (_, example) in zip(answers, drawn, strict=True))
    assert right >= 0.8 * QUESTIONS, answers


def test_the_command_line(
    demo_bundle: Path, drawn: list[tuple[Path, Example]], child_environment: dict[str, str]
) -> None:
    path, example = drawn[0]
    content = [{"type": "image", "image": path}, {"type": "text", "text": example.question}]
    here = "".join(piece.text for piece in Llava.load(demo_bundle).chat([{"role": "user", "content": content}]))
    run = ("run", demo_bundle, "--image", path, "--prompt", example.question, "--threads", 1, "--json")
    result = barred(COMMAND, child_environment, *run)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["text"].strip() == here.strip() != ""
    result = barred(COMMAND, child_environment, "eval", demo_bundle, "--per-kind", 2, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["asked"] == 10
    result = barred(COMMAND, child_environment, "inspect", demo_bundle)
    assert result.returncode == 0, result.stderr
    few = ("--contexts", 16, "--batches", 1, "--threads", 1, "--quick", "--json", "-")
    result = barred(COMMAND, child_environment, "bench", demo_bundle, *few)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["bundle"]["precision"] == "fp32"


def test_the_selftest(
    demo_bundle: Path, demo_checkpoint: Path, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    """Goldens are recorded with PyTorch and replayed without; building, which needs onnx-ir, says so."""
    bundle = shutil.copytree(demo_bundle, tmp_path / "bundle", copy_function=os.link)
    record(open_checkpoint(demo_checkpoint), bundle)
    result = barred(COMMAND, child_environment, "selftest", bundle, "--threads", 1, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["ok"] is True
    assert report["goldens"] == 3
    assert "torch" in report["bundle"]["recorded_with"]
    assert "torch" not in report["versions"]
    result = barred(COMMAND, child_environment, "selftest", bundle, "--build", "-q")  # its engine is there
    assert result.returncode == 0, result.stderr
    shutil.rmtree(bundle / ENGINES)
    result = barred(COMMAND, child_environment, "selftest", bundle, "--build", "-q")
    assert result.returncode == 1
    assert "pip install 'llava-deploy[build]'" in result.stderr


def test_what_needs_the_export_extra_says_so(
    demo_checkpoint: Path, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    result = barred(COMMAND, child_environment, "export", demo_checkpoint, "-o", tmp_path / "bundle")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "which is not installed; install it with: pip install 'llava-deploy[export]'" in line
    assert not (tmp_path / "bundle").exists()


def test_importing_the_runtime_is_quick(child_environment: dict[str, str]) -> None:
    """What takes long to import waits until it is needed: seen in what is loaded, since times differ by machine."""
    script = "from llava_deploy.runtime import Llava\nprint(*sorted({name.partition('.')[0] for name in sys.modules}))"
    result = barred(script, child_environment)
    assert result.returncode == 0, result.stderr
    assert not {"jinja2", "rich", "onnxruntime", *FORBIDDEN} & set(result.stdout.split())


def test_an_export_of_floats_does_not_wait_for_torch(demo_checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom llava_deploy.cli import main\n"
        f"main(['export', {str(demo_checkpoint)!r}, '-o', {str(tmp_path / 'b')!r}, '-q'], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"

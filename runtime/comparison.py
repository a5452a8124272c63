"""Several bundles of one model, asked the same questions: how right each is, and how near it stays to the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from llava_deploy.engines.engine_manifest import weights_size
from llava_deploy.engines.errors import BundleError, InputError
from llava_deploy.engines.manifest import TOKENIZER, Manifest, QuantizationRecipe, read_manifest
from llava_deploy.engines.names import Precision
from llava_deploy.runtime.agreement import Agreement, AgreementMeter, Reference
from llava_deploy.runtime.evaluation import AskedBatch, EvalOptions, EvalReport, Outcome, Question, evaluate
from llava_deploy.runtime.llava import Llava


@dataclass(frozen=True)
class BundleReport:
    """What one bundle scored.

    Attributes:
        weight_bytes: on the disk: both graphs with their weights, and the token embeddings; no engines.
        against_first: how near it stays to the first bundle; ``None`` for that one itself.
    """

    bundle: Path
    precision: Precision
    quantization: QuantizationRecipe | None
    weight_bytes: int
    report: EvalReport
    against_first: Agreement | None

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON: those of the :class:`EvalReport`, and what stands above."""
        return {
            "bundle": str(self.bundle),
            "precision": self.precision,
            "quantization": None if self.quantization is None else asdict(self.quantization),
            "weight_bytes": self.weight_bytes,
            **self.report.to_dict(),
            "against_first": None if self.against_first is None else self.against_first.to_dict(),
        }


class Comparison:
    """Bundles that are loaded and asked one after the other, the first one first; close it at the end.

    Args:
        bundles: directories; the first is what the others are compared with.
        questions: each bundle is asked all of them.
        options: the same for each.

    Raises:
        BundleError: one is no bundle.
        InputError: one has another vocabulary than the first, so that their tokens cannot be compared.
    """

    def __init__(self, bundles: Sequence[Path], questions: Sequence[Question], options: EvalOptions) -> None:
        require_same_tokens(bundles)
        self._questions = questions
        self._options = options
        self._is_first = True
        self._several = len(bundles) > 1
        self._reference = Reference()

    def close(self) -> None:
        """Give back what was kept of the first bundle."""
        self._reference.close()

    def ask(self, llava: Llava, on_answer: Callable[[Outcome], None] = lambda _: None) -> BundleReport:
        """Ask the next bundle; let go of ``llava`` before the one after it is loaded.

        Raises:
            PictureError: a picture that cannot be used.
            PromptError: a question longer than the context.
        """
        meter = None if self._is_first else AgreementMeter(self._reference)

        def compare(asked: AskedBatch) -> None:
            if meter is not None:
                meter.add(llava, asked)
            elif self._several:
                self._reference.record(llava, asked)

        report = evaluate(llava, self._questions, self._options, on_answer, compare)
        self._is_first = False
        manifest = llava.manifest
        return BundleReport(
            bundle=llava.directory,
            precision=manifest.model.precision,
            quantization=manifest.quantization,
            weight_bytes=weights_size(manifest),
            report=report,
            against_first=None if meter is None else meter.result(),
        )


def require_same_tokens(bundles: Sequence[Path]) -> None:
    """Refuse bundles whose token ids do not mean the same; their graphs are not touched.

    Raises:
        BundleError: one is no bundle.
        InputError: one has another vocabulary than the first.
    """
    manifests = [read_manifest(bundle) for bundle in bundles]
    for bundle, manifest in zip(bundles[1:], manifests[1:], strict=True):
        want, found = manifests[0].decoder.vocab_size, manifest.decoder.vocab_size
        if want != found:
            raise InputError(
                f"{bundle}: want a vocabulary of {want:,}, that of {bundles[0]}, found {found:,}; "
                "compare bundles of one model"
            )
        # Two exporters write one vocabulary as different bytes: what counts is which id is which text.
        same_file = manifests[0].entry(TOKENIZER).sha256 == manifest.entry(TOKENIZER).sha256
        if not same_file and _vocabulary(bundles[0], manifests[0]) != _vocabulary(bundle, manifest):
            raise InputError(
                f"{bundle}: want the token ids of {bundles[0]}, found a tokenizer with others; "
                "compare bundles of one model"
            )


def _vocabulary(bundle: Path, manifest: Manifest) -> dict[str, int]:
    path = bundle / manifest.entry(TOKENIZER).path
    try:
        vocabulary: dict[str, int] = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:
        raise BundleError(f"{path}: not a tokenizer ({error}); export the bundle again") from error
    return vocabulary

"""The output error of every linear layer, int4-awq beside int4, on text that AWQ has not seen.

    python benchmarks/int4_linear_errors.py checkpoint/ --text text.txt --work work/ -o result.json

Takes the bundles that int4_perplexity.py left in the work directory. Every layer is run in float32 on what the float
layers before it give; an error is the mean squared error of a linear layer's output over its mean square, in the units
of the layer as it was. What AWQ multiplied into inputs is in its norms; what it divided rows by is not in the bundle:
it is fitted, row by row, which is good to about 0.1 %.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from int4_perplexity import FORMS, Variant
from measuring import circumstances, save, token_windows

from llava_deploy.exporter.checkpoint import Checkpoint, open_checkpoint
from llava_deploy.exporter.config import EMBED_TOKENS
from llava_deploy.exporter.quantization.awq.layers import head_sharing, run_layer
from llava_deploy.exporter.quantization.awq.moments import relative_error
from llava_deploy.exporter.quantization.awq.scales import FOLDS, INPUT_FOLD, MLP_FOLD
from llava_deploy.exporter.quantization.stored import with_stored_decoder
from llava_deploy.exporter.reference.torch_decoder import layer_prefix, load_layer

CPU = torch.device("cpu")
Weights = Mapping[str, torch.Tensor]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="what the bundles were made from")
    parser.add_argument("--text", type=Path, required=True, help="natural text in UTF-8")
    parser.add_argument("--work", type=Path, required=True, help="where the bundles are")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the result, JSON")
    parser.add_argument("--group-size", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--form", choices=FORMS, nargs="+", default=list(FORMS))
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=8)
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.checkpoint)
    config = checkpoint.config.decoder
    windows = token_windows(arguments.text, checkpoint.tokenizer_json, arguments.window)[: arguments.windows]
    table = torch.tensor(checkpoint.tensors[EMBED_TOKENS].read()).float()
    hidden = [table[torch.from_numpy(window)] for window in windows]
    formats = [(size, form) for form in arguments.form for size in arguments.group_size]
    pairs = [(Variant("int4", *chosen), Variant("int4-awq", *chosen)) for chosen in formats]
    stored = {v: with_stored_decoder(checkpoint, arguments.work / v.directory) for pair in pairs for v in pair}
    errors: dict[str, dict[str, dict[str, list[float]]]] = {}
    for index in range(config.num_hidden_layers):
        layer = load_layer(config, checkpoint.tensors, index, CPU)
        floats = {name: parameter.detach() for name, parameter in layer.named_parameters()}
        moments = run_layer(layer, config, hidden, CPU)
        for rounded, searched in pairs:
            rtn = layer_weights(stored[rounded], index, floats)
            awq = in_old_units(layer_weights(stored[searched], index, floats), floats, head_sharing(config))
            kinds = errors.setdefault(searched.name, {})
            for fold in FOLDS:
                for name in fold.readers:
                    found = kinds.setdefault(name, {"int4": [], "int4-awq": []})
                    second, weight = moments[fold.readers[0]].second, floats[f"{name}.weight"]
                    for method, weights in (("int4", rtn), ("int4-awq", awq)):
                        found[method].append(float(f"{relative_error(weight, weights[f'{name}.weight'], second):.4g}"))
        print(f"layer {index} of {config.num_hidden_layers}", flush=True)
    summary = {name: summarised(kinds) for name, kinds in errors.items()}
    tokens = {"text": arguments.text.name, "tokens": int(windows.size)}
    save(arguments.output, {**circumstances(), **tokens, "summary": summary, "errors_by_layer": errors})
    for name, kinds in summary.items():
        print(name)
        for kind, row in kinds.items():
            less = f"{row['less']} of {row['linears']} less"
            print(f"  {kind:12}{less:20}median {row['median']:.3f} x, worst {row['worst']:.3f} x")


def layer_weights(checkpoint: Checkpoint, index: int, like: Weights) -> dict[str, torch.Tensor]:
    """A layer's parameters by the layer's own names, float32."""
    tensors = {name: checkpoint.tensors[layer_prefix(index) + name] for name in like}
    return {name: torch.tensor(source.read()).float() for name, source in tensors.items()}


def in_old_units(weights: Weights, floats: Weights, sharing: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The linear layers' weights with AWQ's scales taken off again."""
    found = dict(weights)
    for fold in FOLDS:
        into = f"{fold.into}.weight"
        if fold in (INPUT_FOLD, MLP_FOLD):
            scales = torch.where(weights[into] == 0, 1.0, floats[into] / weights[into])
        else:  # its own inputs' scales are off already: the folds come in the layer's order
            rows = (found[into] * floats[into]).sum(1) / found[into].square().sum(1)  # least squares, [out_features]
            found[into] = found[into] * rows[:, None]
            scales = sharing[fold.into].spread(rows)
        for name in fold.readers:
            found[f"{name}.weight"] = found[f"{name}.weight"] / scales
    return found


def summarised(kinds: Mapping[str, Mapping[str, list[float]]]) -> dict[str, dict[str, float]]:
    """How many layers' errors are less with AWQ, and AWQ's error over round to nearest's."""
    summary = {}
    for kind, errors in kinds.items():
        ratios = [awq / rtn for awq, rtn in zip(errors["int4-awq"], errors["int4"], strict=True)]
        less = sum(ratio < 1 for ratio in ratios)
        middle, worst = round(statistics.median(ratios), 4), round(max(ratios), 4)
        summary[kind.rpartition(".")[2]] = {"linears": len(ratios), "less": less, "median": middle, "worst": worst}
    return summary


if __name__ == "__main__":
    main()

"""The process of one part: python run_part.py MODULE:FUNCTION ARGUMENTS RESULT, as ``isolation.py`` starts it."""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from outcome import CheckFailedError, NotRunError, Status


def main() -> None:
    function, arguments, target = sys.argv[1:]
    module, _, name = function.partition(":")
    status: Status = "passed"
    reason = ""
    try:
        result: dict[str, Any] = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    except NotRunError as error:
        status, reason, result = "not run", str(error), {}
    except CheckFailedError as error:
        status, reason, result = "failed", str(error), error.result
    except Exception as error:  # noqa: BLE001 (whatever it is, the check goes on and says it)
        traceback.print_exc()
        cause = " ".join(str(error).split())
        status, reason, result = "failed", f"{type(error).__name__}: {cause}"[:2000], {}
    text = json.dumps({"status": status, "reason": reason, "result": result})
    whole = Path(target).with_suffix(".part")
    whole.write_text(text, encoding="utf-8")
    whole.replace(target)


if __name__ == "__main__":
    main()

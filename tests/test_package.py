import subprocess
import sys

import tp_amp


def test_import_is_light() -> None:
    heavy = {"accelerate", "timm", "open_clip", "peft", "scipy", "matplotlib", "pyarrow"}
    code = f"import sys, tp_amp; print(sorted({heavy!r} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_all_is_there_and_documented() -> None:
    for name in tp_amp.__all__:
        documented = getattr(tp_amp, name)
        assert documented.__doc__
        # What functions return.
        if name not in ("MLP", "Attention", "Comparison", "Inspection", "Measurement"):
            assert ">>> " in documented.__doc__, f"{name} has no runnable example"

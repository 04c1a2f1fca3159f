"""The README's Python blocks run, in order, as one script."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    names = {}
    exec("\n".join(blocks), names)
    assert names["answer"].strip()
    assert len(names["again"].vision_slots.methods) == 1
    assert "(10, 10)" in capsys.readouterr().out

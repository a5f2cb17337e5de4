"""Runs the notebooks: each .ipynb is its .py file, executed, with nothing kept of where and when.

    python examples/notebooks/run_notebooks.py                    # all anew: `make notebooks`
    python examples/notebooks/run_notebooks.py --check FILE.py    # run one, write nothing

The .py files (jupytext's percent format) are what people edit and read in a diff.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from base64 import b64decode, b64encode
from importlib import import_module
from io import BytesIO
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image
from traitlets.config import Config

HERE = Path(__file__).resolve().parent
# No device is looked for, and libtpu, which only compiles, does not complain that there is no TPU.
QUIET = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
}
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def sources() -> list[Path]:
    """The .py files of the notebooks, in order."""
    return sorted(HERE.glob("[0-9][0-9]_*.py"))


def notebook(source: Path) -> NotebookNode:
    """The notebook that a .py file describes, not run. The same file gives the same notebook."""
    found = jupytext.read(source, fmt="py:percent")
    found.metadata = nbformat.from_dict(METADATA)
    found.nbformat, found.nbformat_minor = 4, 5
    for k, cell in enumerate(found.cells):
        cell.id, cell.metadata = f"cell-{k:02d}", NotebookNode()
    return found


def run(whole: NotebookNode) -> None:
    """Execute all cells in a new kernel of this Python, and keep their outputs.

    Raises nbclient's CellExecutionError for a cell that fails, RuntimeError for one that warns.
    """
    with tempfile.TemporaryDirectory(prefix="nb") as folder:
        # Nothing of the user's own Jupyter, and sockets that no other kernel can take: files.
        os.environ |= {"IPYTHONDIR": folder, "JUPYTER_RUNTIME_DIR": folder}
        config = Config()
        config.KernelManager.transport = "ipc"
        config.KernelManager.connection_file = f"{folder}/kernel.json"
        client = NotebookClient(
            whole,
            config=config,
            kernel_name="python3",
            timeout=300,
            record_timing=False,
            resources={"metadata": {"path": str(HERE)}},
        )
        client.execute()
    for cell in whole.cells:
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                raise RuntimeError(f"a cell complains:\n{output.text}\nThe cell:\n{cell.source}")
            if "metadata" in output:
                output.metadata = NotebookNode()


def shrink(whole: NotebookNode) -> None:
    """Keep 64 colours of each picture, which is all that a plot needs."""
    for cell in whole.cells:
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", ()):
                output.data["image/png"] = smaller(output.data["image/png"])


def smaller(png: str) -> str:
    """A picture in base64 with 64 colours, and without what else a PNG file says."""
    image = (
        Image.open(BytesIO(b64decode(png))).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    )
    out = BytesIO()
    image.save(out, "png", optimize=True)
    return b64encode(out.getvalue()).decode()


def main() -> None:
    """Run the notebooks that are named, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="their .py files; all when omitted")
    parser.add_argument("--check", action="store_true", help="run only, write nothing")
    args = parser.parse_args()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import_module("matplotlib.font_manager")  # looks for fonts, once, and would say so in a cell
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    for source in args.files or sources():
        whole = notebook(source)
        run(whole)
        if not args.check:
            shrink(whole)
            nbformat.write(whole, source.with_suffix(".ipynb"))
        print(source.name, file=sys.stderr)


if __name__ == "__main__":
    main()

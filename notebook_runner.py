"""Run a notebook from the command line and keep what it shows, whatever happens on the way.

nbclient runs the cells, nbconvert makes the page. A run that fails, hangs, dies or is interrupted
still leaves the notebook as far as it came.
"""

import ast
import asyncio
import contextlib
import html
import queue
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec, NoSuchKernel
from jupyter_client.manager import AsyncKernelManager, KernelManager
from jupyter_core.utils import ensure_async, run_sync
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert import HTMLExporter
from nbconvert.filters import strip_ansi
from nbformat import NotebookNode
from tqdm import tqdm
from traitlets import default

from notebook_builder import as_node, notebook_text, write_atomically
from notebook_sources import BuildError

PARAMETERS, INJECTED = "parameters", "injected-parameters"  # papermill's tags
WIDGET = "application/vnd.jupyter.widget-view+json"
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
MEMORY_HINT = (
    "Most often the memory ran out: lower BATCH_SIZE (--set BATCH_SIZE=16), or IMG_SIZE, or "
    "CACHE_SIZE."
)
BAR = ["HTMLModel", "FloatProgressModel", "HTMLModel"]  # the parts of a tqdm bar
GRACE = 60.0  # seconds that an interrupted cell has to finish what it is doing
SLOW_CELL = 1.0  # seconds from which a cell is worth a line
INTERRUPTED = 130  # the exit status of a command stopped by Ctrl-C


class ThisInterpreter(AsyncKernelManager):
    """Starts ipykernel under the running interpreter, wherever a kernel named python3 leads."""

    @default("transport_encryption")
    def _encrypt_where_possible(self) -> str:
        """Newer kernels warn on a plain connection; older ones have no such setting."""
        return "auto" if zmq.has("curve") else "disabled"

    @property
    def kernel_spec(self) -> KernelSpec:
        """ipykernel's own description of a kernel, which begins with ``sys.executable``."""
        return KernelSpec(**get_kernel_dict())


@dataclass(frozen=True)
class Outcome:
    """How a run ended: exit status, what to tell the user, and the run's own folder if known."""

    status: int
    message: str
    run_dir: Path | None


# --- settings -----------------------------------------------------------------------------------


def inject_overrides(notebook: NotebookNode, overrides: Mapping[str, Any]) -> None:
    """Add `overrides` to ``OVERRIDES`` in a cell after the one tagged ``parameters``."""
    if not overrides:
        return
    tagged = [i for i, c in enumerate(notebook.cells) if PARAMETERS in c.metadata.get("tags", [])]
    if not tagged:
        raise BuildError(f"no cell is tagged {PARAMETERS!r}, so --set has nowhere to go")
    values = "".join(f'    "{name}": {value!r},\n' for name, value in overrides.items())
    injected: dict[str, Any] = {
        "id": INJECTED,
        "cell_type": "code",
        "metadata": {"tags": [INJECTED]},
        "source": f"OVERRIDES = {{\n    **OVERRIDES,\n{values}}}",
        "execution_count": None,
        "outputs": [],
    }
    notebook.cells.insert(tagged[0] + 1, as_node(injected))


# --- running ------------------------------------------------------------------------------------


def run_notebook(
    notebook: NotebookNode,
    stem: str,
    cwd: Path,
    fallback: Path,
    results: Path | None = None,
    timeout: int | None = None,
    kernel: str = "python3",
) -> int:
    """Run every code cell of `notebook` in `cwd`, save notebook and page, return the exit status.

    They are saved as ``<stem>_executed.ipynb`` and ``.html`` in `results`, else in the folder the
    notebook calls ``run_dir``, else in `fallback`.

    Args:
        timeout: seconds a cell may take; None or a negative number: any time.
        kernel: ``python3`` is always the running interpreter; other names are Jupyter's.
    """
    client = NotebookClient(
        notebook,
        timeout=timeout if timeout and timeout > 0 else None,
        kernel_name=kernel,
        resources={"metadata": {"path": str(cwd)}},
        coalesce_streams=True,
    )
    if kernel == "python3":
        client.kernel_manager_class = ThisInterpreter
    outcome = _run_cells(client)
    print(outcome.message, file=sys.stderr if outcome.status else sys.stdout, flush=True)
    flatten_widgets(notebook)
    for path in save(notebook, results or outcome.run_dir or fallback, stem):
        print(path)
    return outcome.status


def _run_cells(client: NotebookClient) -> Outcome:
    """Run the cells in order, up to the first that does not end well."""
    progress = Progress(client.nb)
    cell: NotebookNode | None = None
    run_dir: Path | None = None
    try:
        with client.setup_kernel():
            for index, cell in enumerate(client.nb.cells):
                if cell.cell_type == "code":
                    with progress.of(cell):
                        found = _run_cell(client, cell, index)
                    run_dir = found or run_dir
    except CellFailed as failed:
        run_dir = failed.run_dir or run_dir
        status, message = 1, describe_failure(failed.error, cell)
    except NoSuchKernel as error:
        status, message = 1, f"error: Jupyter knows no kernel {error.name!r}; try --kernel python3"
    except (CellTimeoutError, RuntimeError) as error:  # DeadKernelError is a RuntimeError
        status, message = 1, describe_failure(error, cell)
    except KeyboardInterrupt:
        status, message = INTERRUPTED, f"interrupted in cell {cell.id if cell else 'none'}"
    else:
        status, message = 0, f"ran {progress.done} of {progress.total} code cells in {progress}"
    progress.close()
    client.set_widgets_metadata()
    return Outcome(status, message, run_dir)


class CellFailed(Exception):
    """A cell raised; `run_dir` is what the kernel, still alive, says of it."""

    def __init__(self, error: CellExecutionError, run_dir: Path | None) -> None:
        super().__init__(str(error))
        self.error, self.run_dir = error, run_dir


def _run_cell(client: NotebookClient, cell: NotebookNode, index: int) -> Path | None:
    """Run one cell, and return the run's folder as far as the kernel knows it by then."""
    try:
        client.execute_cell(cell, index)
    except CellExecutionError as error:
        raise CellFailed(error, ask_run_dir(client)) from None
    except (CellTimeoutError, KeyboardInterrupt):
        print(f"waiting up to {GRACE:.0f} s for the cell to end (Ctrl-C: kill it)", file=sys.stderr)
        run_sync(_interrupt)(client)
        raise
    return ask_run_dir(client)


async def _interrupt(client: NotebookClient) -> None:
    """Interrupt the cell as Jupyter's stop button does, and let it save what it has."""
    assert client.km is not None
    listening = asyncio.all_tasks() - {asyncio.current_task()}  # nbclient's, for the cell's output
    await ensure_async(client.km.interrupt_kernel())
    await _wait_until_idle(client.km)
    if listening:
        ended, _ = await asyncio.wait(listening, timeout=5)
        for task in ended:
            if not task.cancelled():
                task.exception()  # seen, so asyncio need not complain that nobody did


async def _wait_until_idle(manager: KernelManager) -> None:
    """Wait up to ``GRACE`` seconds for the kernel to end its cell.

    What nbclient listens with may have ended with the interrupt, so the kernel itself is asked: it
    answers once it is done.
    """
    asking = manager.client()
    asking.start_channels()
    try:
        asking.execute("", silent=True)
        answer: Any = asking.get_shell_msg(timeout=GRACE)
        with contextlib.suppress(queue.Empty):
            await ensure_async(answer)
    finally:
        asking.stop_channels()


def ask_run_dir(client: NotebookClient) -> Path | None:
    """The folder of the run, where a cell has defined ``run_dir`` by now."""
    assert client.kc is not None
    wanted = {"run_dir": "str(run_dir.resolve())"}
    request = client.kc.execute("", silent=True, store_history=False, user_expressions=wanted)
    reply = client.wait_for_reply(request)
    answer = (reply or {}).get("content", {}).get("user_expressions", {}).get("run_dir", {})
    if answer.get("status") != "ok":
        return None
    return Path(ast.literal_eval(answer["data"]["text/plain"]))


def describe_failure(error: Exception, cell: NotebookNode | None) -> str:
    """The cell that failed, its source, why it did, and what may help."""
    if cell is None:
        return f"error: the kernel did not start: {error}"
    hint = ""
    if isinstance(error, CellExecutionError):
        why = "\n".join(t for o in cell.outputs for t in o.get("traceback", []))
        why = why or f"{error.ename}: {error.evalue}"
        hint = MEMORY_HINT if "out of memory" in f"{error.ename} {error.evalue}".lower() else ""
    elif isinstance(error, CellTimeoutError):
        why, hint = "The cell did not end in time.", "Give it longer (--timeout), or less to do."
    elif isinstance(error, DeadKernelError):
        why, hint = "The kernel died while this cell ran.", MEMORY_HINT
    else:
        why = f"{type(error).__name__}: {error}"
    if not sys.stderr.isatty():
        why = strip_ansi(why)  # type: ignore[no-untyped-call]
    source = textwrap.indent(cell.source, "    ")
    return f"error: cell {cell.id} failed\n\n{source}\n\n{why}\n{hint}".rstrip()


class Progress:
    """Shows which cell runs: a bar on a terminal, else a line a section and a slow cell."""

    def __init__(self, notebook: NotebookNode) -> None:
        self.total = sum(cell.cell_type == "code" for cell in notebook.cells)
        self.done = 0
        self.section = ""
        self.started = time.monotonic()
        self.bar = tqdm(total=self.total, unit="cell", file=sys.stdout, disable=None)

    @contextlib.contextmanager
    def of(self, cell: NotebookNode) -> Iterator[None]:
        """Announce `cell`, and count it if it ends well."""
        section = cell.id.rpartition("-")[0]
        started = time.monotonic()
        self.bar.set_description_str(cell.id)
        if self.bar.disable and section != self.section:
            print(f"cell {self.done + 1}/{self.total}  {section}", flush=True)
        self.section = section
        yield
        self.done += 1
        self.bar.update()
        seconds = time.monotonic() - started
        if self.bar.disable and seconds >= SLOW_CELL:
            print(f"cell {self.done}/{self.total}  {cell.id}: {seconds:.1f} s", flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self.bar.close()

    def __str__(self) -> str:
        return f"{time.monotonic() - self.started:.1f} s"


# --- what is kept -------------------------------------------------------------------------------


def flatten_widgets(notebook: NotebookNode) -> None:
    """Replace progress widgets, which need a live kernel, by the last line they showed."""
    states = notebook.metadata.pop("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        kept = []
        for output in cell.outputs:
            view = output.get("data", {}).pop(WIDGET, None)
            text = _widget_text(states, view["model_id"]) if view else None
            if text:
                output["data"] = as_node({"text/plain": text})
            if text != "":
                kept.append(output)
        cell.outputs = kept


def _widget_text(states: Mapping[str, Any], model_id: str) -> str | None:
    """What a tqdm bar shows; "" where it is hidden, None where the widget is no such bar."""
    state = states.get(model_id, {}).get("state", {})
    children = [
        states.get(_model(child), {}).get("state", {}) for child in state.get("children", [])
    ]
    if [child.get("_model_name") for child in children] != BAR:
        return None
    layout = states.get(_model(state.get("layout", "")), {}).get("state", {})
    if layout.get("visibility") == "hidden":
        return ""
    left, bar, right = children
    share = bar["value"] / bar["max"] if bar.get("max") else 0
    blocks = "█" * round(20 * share)
    words = (html.unescape(part.get("value", "")).replace("\u2007", " ") for part in (left, right))
    before, after = (word.strip() for word in words)
    return f"{before} |{blocks:<20}| {after}".strip()


def _model(reference: str) -> str:
    return reference.removeprefix("IPY_MODEL_")


def save(notebook: NotebookNode, folder: Path, stem: str) -> list[Path]:
    """Write ``<stem>_executed.ipynb``, then the same as a page with its images inside."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}_executed{suffix}" for suffix in (".ipynb", ".html")]
    write_atomically(paths[0], notebook_text(notebook).encode())
    exporter = HTMLExporter(embed_images=True)  # type: ignore[no-untyped-call]
    page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": stem.replace("_", " ")}})
    write_atomically(paths[1], page.encode())
    return paths

"""Nothing that is read from outside is run: every call in the package that could do it has to be a safe one.

The package's source is walked, so a call that is added later is found as well.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "owlsam_ray"

FORBIDDEN_IMPORTS = {"cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "pickle", "ray.cloudpickle", "shelve"}
"""Libraries that make objects of any class."""
IMPORTED_FOR_AN_ERROR = dict.fromkeys(("finetune/store.py", "models/mobile_sam.py"), "pickle.UnpicklingError")
"""The only name of such a library that these modules use: what torch raises when it refuses a file."""
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "__import__",
    "compile",
    "importlib.import_module",
    "os.system",
    "os.popen",
    "pd.read_pickle",
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.load_all",
    "yaml.unsafe_load_all",
    "yaml.full_load_all",
    "torch.hub.load",
    "torch.jit.load",
    "torch.package.PackageImporter",
    "shutil.unpack_archive",
    "pa.deserialize",
    "pa.deserialize_pandas",
    "pq.read_table",  # gives no chance to look at the types first
    "pq.read_pandas",
}
FORBIDDEN_METHODS = {"extract", "extractall", "read_pickle", "to_pandas", "allow_pickle"}
"""Of archives, which may write anywhere; and of Arrow tables, whose extension types make objects of any class."""

TELLING_ARGUMENTS = {
    "weights_only",
    "allow_pickle",
    "Loader",
    "trust_remote_code",
    "local_files_only",
    "shell",
    "allow_patterns",
}


@cache
def modules() -> dict[str, ast.Module]:
    """The package: path → source, parsed."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in files}


def problems_of(tree: ast.AST, name: str = "") -> list[str]:
    """What is wrong with a module, a line each."""
    return [f"{name}:{line}: {what}" for line, what in sorted(_problems(tree, name))]


def _problems(tree: ast.AST, name: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for each in FORBIDDEN_IMPORTS & set(names):
                if name not in IMPORTED_FOR_AN_ERROR:
                    yield node.lineno, f"imports {each}"
        elif isinstance(node, ast.Attribute):
            used = _dotted(node)
            if used.startswith("pickle.") and used != IMPORTED_FOR_AN_ERROR.get(name):
                yield node.lineno, f"uses {used}"
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, what) for what in _problems_of_call(node))


def _problems_of_call(call: ast.Call) -> Iterator[str]:
    function = _dotted(call.func)
    last = function.rsplit(".", 1)[-1]
    given = {each.arg: ast.unparse(each.value) for each in call.keywords if each.arg in TELLING_ARGUMENTS}
    # `re.compile` is another.
    if function in FORBIDDEN_CALLS or ("." in function and last in FORBIDDEN_METHODS):
        yield f"calls {function}"
    if function == "torch.load" and given.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if function in ("np.load", "numpy.load", "np.loadtxt") and given.get("allow_pickle") != "False":
        yield f"{function} without allow_pickle=False"
    if function == "yaml.load" and not given.get("Loader", "").endswith("UniqueKeyLoader"):
        yield "yaml.load without the safe loader"
    if last == "from_pretrained" and not function.endswith("Embedding.from_pretrained"):
        if given.get("trust_remote_code") != "False":
            yield f"{function} without trust_remote_code=False"
        if given.get("local_files_only") != "True":
            yield f"{function} without local_files_only=True"
    if "trust_remote_code" in given and given["trust_remote_code"] != "False":
        yield "trust_remote_code is set"
    if given.get("shell", "False") != "False":
        yield "a shell runs a text"
    if last == "snapshot_download" and "safetensors" not in given.get("allow_patterns", ""):
        yield "a download that may hold pickles"


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_no_module_can_run_what_it_reads() -> None:
    assert [problem for name, tree in modules().items() for problem in problems_of(tree, name)] == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=given)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.load(text)",
        "yaml.unsafe_load(text)",
        "archive.extractall(folder)",
        "tarfile.open(path).extract(member)",
        "eval(text)",
        "exec(text)",
        "AutoTokenizer.from_pretrained(path, local_files_only=True)",
        "AutoModel.from_pretrained(path, local_files_only=True, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=False)",
        "pipeline('x', trust_remote_code=True)",
        "subprocess.run(text, shell=True)",
        "pq.read_table(file)",
        "table.to_pandas()",
        "snapshot_download(name)",
    ],
)
def test_the_walk_finds(line: str) -> None:
    assert problems_of(ast.parse(line))


def test_every_parquet_reader_compares_types_first() -> None:
    """Modules that open Parquet or Arrow files, and what each looks at before it takes a value."""
    looks = {
        "sources/spool.py": "LISTING_SCHEMA",  # a file of its own in a private folder
        "sources/table_files.py": "extension_of",
        "run/failure_counts.py": "PREDICTION_SCHEMA",
        "annotate/isolate.py": "misfit_of",
        "run/shards.py": "PREDICTION_SCHEMA",
        "run/manifest.py": "misfit_of",
        "fetch/packed.py": "holds_bytes",
        "reduce/corrections/store.py": "self.schema",  # its reader, overlay.py, compares with CORRECTION_SCHEMA
        "reduce/formats/parquet.py": "schema.empty_table()",  # concat_tables refuses another schema
    }
    readers = ("ParquetFile", "read_metadata", "read_schema", "open_file", "open_stream", "ParquetDataset", "dataset")
    found = set()
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                function = _dotted(node.func)
                if function.startswith(("pq.", "pa.ipc.", "ds.", "pyarrow.")) and function.split(".")[-1] in readers:
                    found.add(name)
    assert found == set(looks), "a module that reads Parquet or Arrow files: let it compare types first, and list it"
    for name, word in looks.items():
        assert word in (PACKAGE / name).read_text(encoding="utf-8"), name

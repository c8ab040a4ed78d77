"""The house: who may import whom, what stays out of the door, and that the picture in the design is the code."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {path.stem: ast.parse(path.read_text()) for path in sorted(ROOT.glob("*.py"))}

# What each file may import of this suite. Leaves import nothing of it.
OWN = {
    # leaves
    "augment": set(),
    "clr_callback": set(),
    "device": set(),
    "distribution": set(),
    "figures": set(),
    "segments": set(),
    "stacks": set(),
    "synthetic": set(),
    "tiling": set(),
    "chunked": {"stacks", "tiling"},
    # on the sums over devices
    "losses": {"distribution"},
    "unet": {"distribution"},
    # two files behind one door each
    "fetching": {"stacks"},
    "data": {"chunked", "stacks", "fetching", "synthetic"},
    "scores": {"segments"},
    # these bring the leaves together
    "evaluation": {"data", "scores", "report"},
    "report": {"data", "evaluation", "segments"},
    "engines": {"data", "device", "unet"},
    "prediction": {"chunked", "data", "device", "engines", "scores", "tiling", "unet"},
    "training": {
        *(
            "augment",
            "clr_callback",
            "data",
            "device",
            "distribution",
            "evaluation",
            "figures",
            "losses",
            "prediction",
            "scores",
            "unet",
        ),
    },
    "dilatedUnet": {"data", "device", "evaluation", "prediction", "reproduce", "training"},
    # these call the command line in processes, and know nothing of what is behind it
    "reproduce": {"comparison"},
    "comparison": {"verdicts", "figures"},
    "verdicts": set(),
    "start": set(),
}
# What each file may import of other people's, the standard library apart.
FOREIGN = {
    "chunked": {"dask", "distributed", "numcodecs", "numpy", "zarr"},
    "augment": {"keras", "numpy"},
    "clr_callback": {"keras"},
    "comparison": set(),
    "data": {"numpy"},
    "device": {"keras", "jax", "tensorflow", "torch"},
    "dilatedUnet": set(),
    "distribution": {"keras", "jax", "numpy", "tensorflow"},
    "engines": {"keras", "numpy", "openvino"},
    "evaluation": {"numpy"},
    "fetching": {"pooch"},
    "figures": {"PIL", "matplotlib", "numpy", "tifffile"},
    "losses": {"keras", "numpy", "scipy"},
    "prediction": set(),
    "report": {"PIL", "matplotlib", "numpy", "scipy"},
    "reproduce": set(),
    "scores": {"numpy", "scipy"},
    "segments": {"numba", "numpy", "scipy", "skimage"},
    "stacks": {"PIL", "numpy", "tifffile"},
    "start": set(),
    "synthetic": {"numpy", "scipy"},
    "tiling": {"numpy"},
    "training": {"keras", "numpy"},
    "unet": {"keras", "tensorflow"},
    "verdicts": {"scipy"},
}
WITHOUT_KERAS = ("chunked", "data", "tiling", "scores", "figures", "evaluation", "report", "reproduce")


def imports(tree, *, only_top_level=False):
    """First names of the modules that a file imports."""
    nodes = tree.body if only_top_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_every_file_has_its_place_in_the_table():
    assert set(MODULES) <= set(OWN)
    assert "utils" not in MODULES
    assert not list(ROOT.glob("*/__init__.py"))


@pytest.mark.parametrize("name", MODULES)
def test_a_file_imports_only_what_the_table_allows(name):
    found = set(imports(MODULES[name])) - {"__future__"}
    assert found & set(OWN) <= OWN[name]
    assert found - set(OWN) - sys.stdlib_module_names <= FOREIGN[name]


def test_the_leaves_import_nothing_of_the_suite_but_the_sums_over_devices():
    leaves = {name for name, allowed in OWN.items() if allowed <= {"distribution"}}
    assert {"augment", "unet", "losses", "clr_callback", "tiling", "figures"} <= leaves
    for name in leaves & set(MODULES):
        assert not set(imports(MODULES[name])) & (set(OWN) - {"distribution"}), name


def test_nobody_imports_the_tests_or_the_benchmarks():
    for name, tree in MODULES.items():
        assert not set(imports(tree)) & {"benchmarks", "conftest", "pytest", "tests"}, name


def test_the_command_line_imports_the_standard_library_only_until_the_flags_are_parsed():
    assert set(imports(MODULES["dilatedUnet"], only_top_level=True)) <= sys.stdlib_module_names


@pytest.mark.parametrize("name", [name for name in WITHOUT_KERAS if name in MODULES])
def test_it_imports_without_keras(name):
    code = f"import sys, {name}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded = {module.split(".")[0] for module in done.stdout.split()}
    assert name in loaded
    assert not loaded & {"keras", "tensorflow", "jax", "torch"}


def test_nothing_read_from_a_file_can_run_code():
    """No pickle, no loading of whole models, no Lambda layers, no eval: only numbers come out of a weight file."""
    forbidden = {"Lambda", "load_model", "pickle", "eval", "exec", "enable_unsafe_deserialization"}
    for name, tree in MODULES.items():
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not (names | set(imports(tree))) & forbidden, name
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            flags = {keyword.arg: keyword.value for keyword in call.keywords}
            if "allow_pickle" in flags:
                assert flags["allow_pickle"].value is False, name
            if ast.unparse(call.func) in ("np.load", "numpy.load"):
                assert "allow_pickle" in flags, f"{name}: {ast.unparse(call)}"


def test_nothing_is_drawn_from_a_global_generator():
    allowed = {"default_rng", "SeedSequence", "Generator", "SeedGenerator", "PCG64"}
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and re.fullmatch(r"(np|numpy|keras)\.random\.\w+", ast.unparse(node)):
                assert node.attr in allowed, f"{name}: {ast.unparse(node)}"
        assert "random" not in imports(tree), name


def test_asserts_live_in_tests_only():
    for name, tree in MODULES.items():
        assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)], name


def test_every_flag_is_consumed():
    """Each destination of the parser is read somewhere as args.<destination>, or by a name in a list of names."""
    import dilatedUnet

    parser = dilatedUnet.build_parser()
    verbs = next(action for action in parser._actions if hasattr(action, "choices") and action.choices)
    read, named = set(), set()
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Load)
                and ast.unparse(node.value)
                in (
                    "args",
                    "self.args",
                )
            ):
                read.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and name == "training":
                named.add(node.value)  # recipe_of reads a list of fields by getattr
    recipe = {"elastic_grid", "elastic_sd_px", "max_rotation_deg", "max_shear_deg", "max_shift_px", "noise"}
    assert recipe <= named
    for verb, subparser in verbs.choices.items():
        flags = {action.dest for action in subparser._actions} - {"help"}
        assert flags <= read | recipe, verb
        assert len(flags) > 0

"""The command line: flags, defaults, contradictions, exit codes, and what must not be imported to parse them."""

import re
from unittest.mock import Mock

import numpy as np
import pytest
import tifffile
from conftest import cases, python

import dilatedUnet
from dilatedUnet import parse
from files import fetching
from files.flags import in_words
from files.shell import Terminated

STANDARD, DILATED = (
    f"--lr 0.00001 --max_lr 0.01 --epochs 500 {network} --weight_path weights/{name}_unet.weights --addition 1"
    for name, network in (("standard", "--dilate_rate 1 --dilate 0"), ("dilated", "--dilate_rate 2 --dilate 1"))
)


def flags_of(verb):
    actions = dilatedUnet.build_parser().of_verb[verb]._actions
    return {action.dest: action for action in actions if action.dest != "help"}


@pytest.mark.parametrize(("words", "dilate", "rate"), [(STANDARD, 0, 1), (DILATED, 1, 2)])
def test_the_published_commands_parse_word_for_word(words, dilate, rate):
    args = parse(words.split())
    assert (args.verb, args.lr, args.max_lr, args.epochs) == ("train", 1e-5, 1e-2, 500)
    assert (args.dilate, args.dilate_rate, args.addition) == (dilate, rate, 1)
    assert (args.protocol, args.batch_size, args.steps_per_epoch, args.window) == ("published", 3, 10, 512)
    assert (args.optimizer, args.loss, args.clr_mode, args.step_size) == ("rmsprop", "bce_dice", "triangular", 2000)
    assert (args.dropout, args.classes, args.patience, args.filters) == (0.3, 2, 300, (44, 88, 176))


def test_every_flag_of_the_published_script_is_there_with_its_default_and_train_is_the_default_verb():
    args = parse([])
    assert (args.epochs, args.classes, args.lr, args.max_lr) == (300, 2, 1e-5, 5e-4)
    assert (args.dilate, args.dilate_rate, args.addition) == (1, 1, 1)
    assert {"image_path", "mask_path", "weight_path", "gpu"} <= flags_of("train").keys()
    assert not differing("--epochs 4", "train --epochs 4")
    assert [parse(words).verb for words in ([], ["--epochs", "4"], ["check"])] == ["train", "train", "check"]
    assert not differing("--lr 0.00001 --max_lr 0.01 --epochs 500", "--recipe published")


def test_the_help_opens_with_commands_lists_the_verbs_and_says_what_every_flag_of_theirs_does(call):
    done = call("--help")
    assert (done.code, "python dilatedUnet.py predict" in done.out) == (0, True)
    for verb in dilatedUnet.VERBS:
        assert re.search(rf"^    {verb}\b", done.out, re.MULTILINE), verb
        helped = call(verb, "--help")
        assert (helped.code, helped.err) == (0, "")
        assert f"usage: dilatedUnet.py {verb}" in helped.out
        assert all(action.help for action in flags_of(verb).values())


def test_help_imports_nothing_heavy(tmp_path):
    """What makes `--help` slow is what it imports; a time would depend on the machine."""
    code = (
        "import contextlib as c, sys, dilatedUnet\nwith c.suppress(SystemExit): dilatedUnet.main(['train', '--help'])"
    )
    done = python("-c", code + "\nprint('LOADED', *sys.modules)")
    assert "--dilate_rate" in done.stdout
    loaded = {module.split(".")[0] for module in done.stdout.split("LOADED")[1].split()}
    assert "dilatedUnet" in loaded
    heavy = {"keras", "tensorflow", "jax", "torch", "scipy", "skimage", "matplotlib", "PIL", "tifffile", "pooch"}
    assert not loaded & {*heavy, "numba", "numpy"}


OUT_OF_RANGE = f"""--epochs 0, --epochs ten, --lr 0, --lr -1, --lr nan, --lr inf, --lr {"1" * 401}, --seed {"1" * 401},
    --sigma 1e300, --clr_gamma 0, --batch_size 100000, --val_windows 1000000000, --lr_find 1000000000, --lr_find 3,
    --distribute 1000, --folds 1000000000, --folds 1, --dilate_rate 1000000, --dropout 1, --classes 1, --bn_momentum 1,
    predict --tile 0, predict --threshold 1.5"""


@pytest.mark.parametrize("flags", OUT_OF_RANGE.split(","))
def test_a_number_out_of_range_is_refused_with_its_flag_and_range(refuses, flags):
    *_, flag, value = flags.split()
    said = refuses(f"argument {flag}: must be", *flags.split())
    rule = rf"(above|at least) \S+ and at most \S+\. Received: {value[:70]}|a whole number. Received: ten"
    assert re.search(rule, said)


REFUSED = {  # what is said of which flags
    "argument --epochs: must be at least 1 and at most 1000000. Received: 0": ["--epochs 0"],
    "argument --epochs: must have a value. Received: --": ["--epochs=--"],
    "--batch_size windows must hold at most 1073741824 px": ["--batch_size 1024 --window 4096"],
    "argument --filters: must be 1 to 8 whole numbers of at most 4096, such as 44,88,176. Received: ": [
        *("--filters 1000000000", "--filters 4,x", "--filters 4,0")
    ],
    "argument --gpu: must be the number of a GPU": ["--gpu first"],
    "argument --weight_path: must be a file, not a folder. Received: ": ["--weight_path .", "--weight_path runs/.."],
    "argument --augment_preview: must be a file, not a folder": ["--augment_preview ."],
    "argument --run_dir: must be a path. Received: ''": ["--run_dir="],
    "argument --image_path: must be a path: no home folder": ["--image_path ~no-such-user/x.tif"],
    "argument --dilate: invalid choice: 2": ["--dilate 2"],
    "argument --optimizer: invalid choice: 'lion'": ["--optimizer lion"],
    "argument --recipe: invalid choice: 'slow'": ["--recipe slow"],
    "argument --tta: invalid choice: '5'": ["predict --tta 5"],
    "invalid choice: 'cifar'": ["fetch cifar"],
    "unrecognized arguments: --no_such_flag": ["--no_such_flag"],
    "check, export. Received: predct (did you mean predict?)": ["predct --weight_path x"],
    "argument --output: must be a file that ends in .tif or .tiff or .zarr": ["predict --output x.png"],
    "argument --output: must be a path. Received: ''": ["predict --output="],
    "--image_path: nowhere.tif does not exist": ["check --image_path nowhere.tif"],
    # flags that contradict each other
    "--val_sections goes with --protocol holdout": ["--val_sections 3-4", "--val_sections 3-4 --protocol kfold"],
    "--fold and --folds go with --protocol kfold": ["--fold 0", "--folds 3 --protocol holdout"],
    "--gap needs held-out sections": ["--gap 1"],
    "--inner_sections goes with --protocol holdout or kfold": ["--inner_sections 0"],
    "--val_windows goes with --protocol published": ["--val_windows 3 --protocol holdout"],
    "--patience needs validation": [f"--patience 3 --protocol {p}" for p in ("all", "holdout --inner_sections 0")],
    "--filters of unet2015 is one number": ["--arch unet2015 --filters 4,8"],
    "--depth, --padding and --batch_norm go with --arch unet2015": ["--depth 3", "--padding same", "--batch_norm"],
    "--dilate, --dilate_rate and --addition go with --arch unet2017": [
        "--arch resunet --dilate 1",
        "--arch unet2015 --addition 0",
        "--recipe quick --arch resunet --dilate_rate 2",
    ],
    "--w0 and --sigma go with --loss weighted": ["--arch unet2015 --loss bce --sigma 3", "--w0 5"],
    "--invert_mask is of no use with --instances": ["--instances --protocol holdout --invert_mask"],
    "--instances goes with --protocol holdout, kfold or all": ["--instances"],
    "--step_size is of no use with --clr_mode none": ["--step_size 5 --clr_mode none"],
    "--step_size is of no use with --clr_mode cosine": ["--step_size 5 --clr_mode cosine"],
    "--clr_gamma goes with --clr_mode exp_range": ["--clr_gamma 0.9"],
    "--max_lr must be at least --lr": ["--lr 0.1 --max_lr 0.01", "--lr 0.1"],
    "--max_lr is of no use with --clr_mode none": ["--max_lr 0.1 --clr_mode none"],
    "--momentum goes with rmsprop and sgd": ["--momentum 0.9 --optimizer adam"],
    "--resume goes on with a run and --force replaces it": ["--resume --force"],
    "two different jobs": ["--lr_find --augment_preview x.png"],
    "--lr_find runs on one device": ["--lr_find --distribute"],
    "--minutes runs on one device": ["--minutes 3 --distribute"],
    "--average_warmup goes with --ema": ["--arch unet2015 --average_warmup 1"],
    "--merge is of no use with --instances": ["--merge 1 --instances --protocol holdout"],
    "--merge goes with --protocol holdout, kfold or all": ["--merge 1"],
    "--dropout must be 0, or above 1/512. Received: 0.001": ["--dropout 0.001"],
    "--steps_per_execution must be a divisor": ["--steps_per_epoch 10 --steps_per_execution 3"],
    "--window must be a multiple of 8. Received: 500": ["--window 500"],
    "--window must be a multiple of 16. Received: 8": ["--window 8 --filters 1,1,1,1"],
    "--bn_momentum goes with --batch_norm": ["--arch unet2015 --bn_momentum 0.9"],
    "go with --protocol kfold; --recipe quick sets --protocol holdout": ["--recipe quick --fold 1"],
    "--lr, 0.01. Received: 0.004; --recipe quick sets --max_lr 0.004": ["--recipe quick --lr 1e-2"],
    "--step_size is of no use with --clr_mode cosine; --recipe quick sets": ["--recipe quick --step_size 9"],
}


@pytest.mark.parametrize(("words", "flags"), [(words, flags) for words, lines in REFUSED.items() for flags in lines])
def test_bad_usage_is_refused_in_one_sentence_that_names_the_flag(refuses, tmp_path, words, flags):
    refuses(words, *flags.split())
    assert not list(tmp_path.iterdir())


def differing(a, b):
    """The settings in which two command lines differ."""
    a, b = (vars(parse(words.split())) for words in (a, b))
    return {key: b[key] for key in a if a[key] != b[key]}.keys() - {"argv", "recipe"}


@pytest.mark.parametrize("name", dilatedUnet.RECIPES)
def test_a_recipe_is_what_its_flags_are_and_is_shown_where_one_looks(call, small, name):
    words = " ".join(in_words(dilatedUnet.RECIPES[name]))
    assert parse(["--recipe", name]).recipe == name
    assert not differing(words, f"--recipe {name}")
    for shown in (call("train", "--help").out, call("check", "--image_path", small / "images.tif").out):
        assert f"--recipe {name}: " in shown
        assert " ".join(words.split()[:4]) in shown


@cases(
    "flags, changed",
    ("--epochs 8", {"epochs"}),
    ("--protocol kfold --fold 1", {"protocol", "fold"}),
    ("--protocol all", {"protocol", "inner_sections"}),
    ("--protocol published", {"protocol", "inner_sections", "val_windows", "merge"}),
    ("--patience 5", {"patience", "inner_sections"}),
    ("--optimizer sgd", {"optimizer"}),
    ("--clr_mode none", {"clr_mode", "max_lr"}),
    ("--clr_mode triangular --step_size 5", {"clr_mode", "step_size"}),
    ("--arch unet2015", {"arch", "filters", "window", "loss", "bn_momentum"}),
    ("--arch unet2017", {"arch", "filters"}),
    ("--dilate 1", {"arch", "filters", "dilate"}),
    ("--ema 0", {"ema"}),
)
def test_a_flag_by_hand_wins_over_the_recipe(flags, changed):
    assert differing("--recipe quick", f"{flags} --recipe quick") == changed
    for name, value in zip(flags.split()[::2], flags.split()[1::2], strict=True):
        assert str(vars(parse(["--recipe", "quick", *flags.split()]))[name[2:]]) in (value, value + ".0")


def test_a_zarr_may_be_named_with_the_slash_that_a_shell_adds():
    assert parse(["predict", "--output", "out/p.zarr/"]).output == "out/p.zarr"


def test_the_network_that_a_recipe_has_anyway_changes_nothing():
    assert not differing("--recipe cells", "--recipe cells --arch unet2015 --instances")
    assert differing("--recipe cells", "--recipe cells --filters 64") == {"filters"}


def test_a_network_by_hand_has_filters_of_its_own_and_not_those_of_the_recipes_network():
    for words, filters in (("--arch resunet", [16, 32, 64, 128, 128]), ("--dilate 1", [44, 88, 176]), ("", [16])):
        args = parse(["--recipe", "cells", *words.split()])
        assert [*args.filters] == filters
        assert (args.instances, args.window, args.augment, args.loss) == (True, 256, "all", "weighted")
    assert [*parse(["--recipe", "cells", "--arch", "resunet", "--filters", "4,8"]).filters] == [4, 8]
    for words, window in (("quick --arch unet2015", 572), ("quick --arch unet2015 --padding same", 256)):
        assert parse(["--recipe", *words.split()]).window == window
    assert parse(["--recipe", "cells", "--padding", "valid"]).window == 572


def test_minutes_and_epochs_by_hand_contradict_each_other(capsys):
    assert differing("--recipe quick", "--recipe quick --minutes 3") == {"minutes"}
    for words in ("--minutes 3 --epochs 300", "--recipe quick --epochs 7 --minutes 3"):
        with pytest.raises(SystemExit):
            parse(words.split())
        assert "--minutes takes the place of --epochs: choose one" in capsys.readouterr().err


def test_check_reads_cells_and_tells_the_split_of_the_recipe_for_cells(call, tmp_path):
    for name, dtype in (("images", np.uint8), ("cells", np.uint16)):
        tifffile.imwrite(tmp_path / f"{name}.tif", np.arange(10 * 64 * 64).reshape(10, 64, 64).astype(dtype) // 64)
    words = ("check", "--image_path", "images.tif", "--mask_path", "cells.tif", "--window", "64", "--recipe", "cells")
    done = call(*words)
    assert "labels: instances" in done.out
    assert "train on 0-4 (5), choose weights on 5, leave out 6-7, hold out 8-9" in done.out


@cases(
    "words, said",
    ("--image_path my.tif", True),
    ("--image_path my.tif --recipe quick", False),
    ("--image_path isbi2012", False),
)
def test_who_brings_sections_without_a_recipe_is_told_which_is_for_them(call, monkeypatch, words, said):
    monkeypatch.setattr(dilatedUnet, "look_for", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert ("--recipe quick" in call(*words.split()).err) is said


def test_predict_takes_the_shipped_network_and_says_so_unless_another_is_named(call, monkeypatch):
    from predict import prediction

    taken = []
    monkeypatch.setattr(dilatedUnet, "load_backend", lambda args: None)
    monkeypatch.setattr(prediction, "run", lambda args: taken.append(args.weight_path) or 0)
    assert str(dilatedUnet.SHIPPED) in call("predict").err
    assert not call("predict", "--weight_path", "a", "b").err
    assert taken == [[str(dilatedUnet.SHIPPED)], ["a", "b"]]
    assert prediction.read_record(taken[0][0])["network"]["arch"] == "resunet"


@cases(
    "error, code, words",
    (OSError(28, "No space left on device"), 2, "No space left on device"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (Terminated(), 143, "SIGTERM"),
    (MemoryError("Unable to allocate 6 GiB"), 2, "out of memory"),
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"), 2, "out of memory"),
    (RuntimeError("RESOURCE_EXHAUSTED: a/events.v2; No space left on device"), 2, "a/events.v2; No space left on"),
    (RecursionError("maximum recursion depth exceeded"), 2, "nested too deep"),
)
def test_what_goes_wrong_becomes_an_exit_code_and_one_sentence(call, monkeypatch, error, code, words):
    monkeypatch.setattr(dilatedUnet, "run_check", Mock(side_effect=error))
    done = call("check")
    assert done.code == code
    assert words in done.err
    assert len(done.err.splitlines()) == 1


def test_a_bug_shows_its_traceback(call, monkeypatch):
    """A ValueError out of the depths is no bad input: it must not be passed off as one."""
    monkeypatch.setattr(dilatedUnet, "run_check", Mock(side_effect=ValueError("deep inside")))
    with pytest.raises(ValueError, match="deep inside"):
        call("check")


@cases(
    "flags, said, not_said",
    ("SMALL/images.tif --mask_path SMALL/labels.tif", "uint8, 255 = interior, holdout: train on 0-7", "problem"),
    ("SMALL/images.tif --mask_path SMALL/labels.tif --invert_mask", "10 sections of 64 x 80 px, 64 x 64 px", "problem"),
    ("SMALL/images.tif --mask_path SMALL/labels.tif --invert_mask", "255 = membrane", "255 = interior"),
    ("SMALL/images.tif", "10 sections of 64 x 80 px", "mask"),
    ("sections", "3 sections of 64 x 80 px", "mask"),
    ("challenge", "255 = interior", "problem"),
)
def test_check_says_what_the_files_are_and_of_images_alone_no_masks(call, small, tmp_path, flags, said, not_said):
    for folder in ("challenge", "sections"):
        (tmp_path / folder).mkdir()
    for ours, theirs in (("images.tif", "train-volume.tif"), ("labels.tif", "train-labels.tif")):
        (tmp_path / "challenge" / theirs).write_bytes((small / ours).read_bytes())
    for i, section in enumerate(tifffile.imread(small / "images.tif")[:3]):
        tifffile.imwrite(tmp_path / "sections" / f"{i}.tif", section)
    done = call("check", "--window", "64", "--image_path", *flags.replace("SMALL", str(small)).split())
    assert done.code == 0, done.out
    assert all(words in done.out for words in said.split(", "))
    assert not_said not in done.out


@cases(
    "flags, words",
    ("", "--window must fit into the sections"),
    ("--window 512", "--window must fit into the sections"),
    ("--recipe strong", "at most 64. Received: 256"),
    ("--window 60", "--window must be a positive multiple of 8"),
    ("--recipe quick --window 40", "--window must be a positive multiple of 16"),
    ("--mask_path IMAGES", "must hold two label values"),
)
def test_check_ends_with_2_where_training_would_fail(call, small, flags, words):
    flags = flags.replace("IMAGES", str(small / "images.tif")).split()
    done = call("check", "--image_path", small / "images.tif", *flags)
    assert done.code == 2
    assert any(line.startswith("problem:") and words in line for line in done.out.splitlines())


def test_fetch_prints_the_folder_of_a_data_set(call, monkeypatch, isbi):
    done = call("fetch", "isbi2012")
    assert (done.code, done.out.strip()) == (0, str(isbi))


def test_fetch_knows_its_data_sets_and_says_what_to_do_without_a_connection(refuses, monkeypatch, tmp_path):
    monkeypatch.setenv("DILATED_UNET_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(fetching, "_download", Mock(side_effect=OSError("no route to host")))
    refuses("isbi2012 could not be fetched", "fetch", "isbi2012")
    assert not list(tmp_path.glob("cache/isbi2012/*"))
    assert set(dilatedUnet.DATA_SETS) == set(fetching.DATA_SETS) - {"synthetic"}

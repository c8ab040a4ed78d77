"""The types of flags for argparse: each refuses by naming the rule and the value."""

import argparse
import os
import re


def refuse(rule, text):
    raise argparse.ArgumentTypeError(f"must be {rule}. Received: {text if len(text) < 80 else text[:77] + '...'}")


def number(kind, low, high, *, above=False):
    """An argparse type: a number of `kind` within low..high (`above`: greater than low)."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            refuse("a whole number" if kind is int else "a number", text)
        if not (low < value if above else low <= value) or not value <= high:
            refuse(f"{'above' if above else 'at least'} {low} and at most {high}", text)
        return value

    return parse


label_value = number(int, -(2**31), 2**32 - 1)
channel = number(int, 0, 2**16)


def up_to(high):
    return number(int, 1, high)


def filter_list(text):
    """44,88,176 -> (44, 88, 176)."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not 1 <= len(values) <= 8 or min(values) < 1 or max(values) > 4096:
        refuse("1 to 8 whole numbers of at most 4096, such as 44,88,176", text)
    return values


def in_words(settings):
    """Settings as the words of a command line; True for a flag without a value.

    >>> in_words({"lr": "1e-5", "filters": (16, 32), "instances": True})
    ('--lr', '1e-5', '--filters', '16,32', '--instances')
    """
    words = []
    for name, value in settings.items():
        words.append(f"--{name}")
        if value is not True:
            words.append(",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    return tuple(words)


def path(text):
    """A path, its ~ resolved here and nowhere else."""
    found = os.path.expanduser(text)
    if not found.strip() or "\0" in found:
        refuse("a path", repr(text))
    if found.startswith("~") and not os.path.exists(found):
        refuse("a path: no home folder of that user is known here", text)
    return found


def file(text, endings=()):
    """A path whose last part can name a file, with one of the endings, if there are any."""
    found = path(text)
    if found.rstrip("/\\").lower().endswith(".zarr"):  # a folder, which a shell completes with a slash
        found = found.rstrip("/\\")
    if os.path.basename(found) in ("", ".", ".."):
        refuse("a file, not a folder", text)
    if endings and not found.lower().endswith(endings):
        refuse(f"a file that ends in {' or '.join(endings)}", text)
    return found


def devices(text):
    """What CUDA_VISIBLE_DEVICES takes."""
    if not re.fullmatch(r"-1|\d{1,4}(,\d{1,4})*|(GPU|MIG)-[\w/-]+(,(GPU|MIG)-[\w/-]+)*", text):
        refuse("the number of a GPU such as 0, several such as 0,1, or -1 for the CPU", repr(text))
    return text

"""In which form a dataset's streams are to be, where nothing is pinned yet.

What an operator set on the dataset itself beforehand is a choice, and kept. What it inherits is none: user properties
are inherited, and a parent that is a volume has its own form pinned.
"""

from __future__ import annotations

from backends.zfs import properties
from backends.zfs.commands import LIST_DEADLINE
from backends.zfs.context import Context
from backends.zfs.failures import Operation, failure
from backends.zfs.listing import Dataset
from backends.zfs.properties import StreamForm
from replicator.errors import InvalidName

_CHOSEN = "local"


def form_to_pin(context: Context, dataset: Dataset) -> StreamForm:
    """The pinned form; or the one that was chosen; or that of the data.

    :raises InvalidName: something was chosen that is no form
    """
    if dataset.form is not None:
        return dataset.form
    argv = ("zfs", "get", "-H", "-p", "-o", "value,source", properties.STREAM, dataset.name)
    done = context.attempt(*argv, deadline=LIST_DEADLINE)
    if done.status != 0:
        raise failure(done, Operation(context.storage, dataset.name, "reading the properties of"))
    value, _, source = done.output.strip().partition("\t")
    if source != _CHOSEN:
        return dataset.default_form
    try:
        return StreamForm(value)
    except ValueError:
        raise InvalidName(
            f"property {properties.STREAM} is {value!r} on {dataset.name}, and neither {StreamForm.RAW} nor "
            f"{StreamForm.PLAIN}",
            hint=f"zfs set {properties.STREAM}={StreamForm.PLAIN} {dataset.name}, or {StreamForm.RAW}; or for that of "
            f"the data, raw where it is encrypted: zfs inherit {properties.STREAM} {dataset.name}",
        ) from None

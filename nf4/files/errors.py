"""The one error of every reader of files: what is wrong, in which file, tensor and field."""

from __future__ import annotations


class FormatError(ValueError):
    """A file, or a dictionary of tensors as read from one, does not have the layout it claims.

    Attributes:
        file: path of the file, or None when the data did not come from one.
        tensor: name of the tensor, or None.
        field: the field of the header, the JSON payload or the configuration, or None.
        message: what is wrong; ``str`` of the error says where, too.
    """

    def __init__(self, message: str, *, file: object = None, tensor: str | None = None, field: str | None = None):
        self.message = message
        self.file = None if file is None else str(file)
        self.tensor = tensor
        self.field = field
        where = [self.file, tensor and f"tensor {tensor!r}", field and f"field {field!r}"]
        place = ", ".join(part for part in where if part)
        super().__init__(f"{place}: {message}" if place else message)

"""Walk the sections of a file of options: find each one's name and the options in it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel, Tag

NAME = "NAME"  # stands for a name that the user gives, or for a number in a list


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Name some options that stand together: `train`, `train.clm`, `sources.NAME`; the file's own have no name.

    `kind` tells sections apart that share a name: a source is a model or a server.
    """

    name: str
    kind: str
    options: type[BaseModel]

    def list_names(self) -> list[str]:
        """Return the names of the options as a file has them."""
        return [field.alias or name for name, field in self.options.model_fields.items()]

    def is_at(self, place: Sequence[str]) -> bool:
        """Tell whether the options at that place of a file are of this section."""
        parts = self.name.split(".") if self.name else []
        return len(parts) == len(place) and all(p in (NAME, at) for p, at in zip(parts, place, strict=True))


def list_sections(options: type[BaseModel], name: str = "", kind: str = "") -> list[Section]:
    """Return the sections of a file in its order, each before those within it."""
    sections = [Section(name=name, kind=kind, options=options)]
    for option, field in options.model_fields.items():
        for found, tag, is_named in _find_options(field.annotation, field.metadata):
            place = f"{name}.{option}".lstrip(".") + (f".{NAME}" if is_named else "")
            sections += list_sections(found, place, tag)
    return sections


def _find_options(
    annotation: Any, metadata: Sequence[Any] = (), is_named: bool = False
) -> Iterator[tuple[type[BaseModel], str, bool]]:
    """Yield the models of options within an annotation, each with its tag, and whether it stands under a name."""
    tag = next((of.tag for of in metadata if isinstance(of, Tag)), "")
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, tag, is_named
    elif hasattr(annotation, "__metadata__"):
        yield from _find_options(annotation.__origin__, annotation.__metadata__, is_named)
    else:
        for part in get_args(annotation):
            yield from _find_options(part, metadata, is_named or get_origin(annotation) in (dict, list))

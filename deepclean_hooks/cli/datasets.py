"""Pictures with labels from where they lie: a folder of classes, a table, Hugging Face's
`datasets`, torchvision."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from torch.utils.data import Dataset

_PICTURES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_TABLES = (".csv", ".tsv", ".parquet")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which pictures the model was trained on, and which others serve."""

    data: Annotated[
        str,
        "the training data: a folder of class folders; a .csv, .tsv or .parquet of paths and "
        "labels; a folder of Hugging Face's datasets (FOLDER:SPLIT where it has several); "
        "torchvision:NAME, torchvision:NAME:test",
    ]
    root: Annotated[
        Path | None, "where torchvision's data lie, and what paths in a table are relative to"
    ] = None
    path_column: Annotated[str, "the column of paths, or of pictures"] = "path"
    label_column: Annotated[str, "the column of labels"] = "label"
    id_column: Annotated[
        str | None, "the column by whose values samples are named, not by their paths"
    ] = None
    class_names: Annotated[
        Path | None, "a text file, a class name a line, in the order of the model's head"
    ] = None
    batch_size: Annotated[int, "samples at once", 1] = 64
    workers: Annotated[int, "processes that read pictures; 0: this process does", 0] = 0


class Pictures(Dataset[Any]):
    """(picture under `transform`, class index) of each sample, with what is known of it: `samples`
    (name, class index), `classes` (names, if any), `column_names`; a column is `pictures[name]`.
    """

    def __init__(
        self,
        where: str,
        names: Sequence[str],
        labels: Sequence[Any],
        picture: Callable[[int], Any],
        *,
        classes: Sequence[str] | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        files: bool = True,
    ) -> None:
        """`labels` are names of classes or class indices. Raises ValueError, with the sample, for a
        label that is neither."""
        self.where, self.names, self.files = where, list(names), files
        self.transform: Callable[[Any], Any] | None = None
        self._picture, self._columns = picture, dict(columns or {})
        self.column_names = list(self._columns)
        self.classes, self.targets = _indices(where, self.names, labels, classes)
        if files:
            self.samples = list(zip(self.names, self.targets, strict=True))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, str):
            return self._columns[at]
        try:
            picture = self._picture(at).convert("RGB")
        except Exception as reason:  # Pillow has no error of its own for a damaged file
            raise ValueError(
                f"{self.where}: {self.names[at]} cannot be read as a picture "
                f"({type(reason).__name__}); repair it, or take it out of the data"
            ) from reason
        return picture if self.transform is None else self.transform(picture), self.targets[at]


def opened(spec: str, options: DataOptions, classes: Sequence[str] | None = None) -> Pictures:
    """The pictures that `spec` names; `classes`: the training data's, in the head's order.

    Raises ValueError, with the file and the line, for what cannot be read as pictures with labels.
    """
    if classes is None and options.class_names is not None:
        classes = lines(options.class_names)
    kind, _, name = spec.partition(":")
    if kind == "torchvision":
        return _torchvision(name, options, classes)
    path = Path(spec)
    if path.suffix in _TABLES:
        return _table(path, options, classes)
    folder, split = (path, None) if path.is_dir() else (Path(spec.rpartition(":")[0]), name)
    if not folder.is_dir() or str(folder) in ("", "."):
        raise ValueError(
            f"{spec} is no folder, no {', '.join(_TABLES)} and not torchvision:NAME; correct --data"
        )
    if any(
        (folder / f).is_file() for f in ("dataset_dict.json", "state.json", "dataset_info.json")
    ):
        return _hugging_face(folder, split, options, classes)
    if split:
        raise ValueError(f"{folder} is no folder of Hugging Face's datasets; leave :{split} out")
    return _folder(folder, classes)


def lines(path: Path) -> list[str]:
    """The lines of a text file; raises ValueError if all of them are empty."""
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as reason:
        words = getattr(reason, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"{path} cannot be read: {words}; give a text file") from reason
    if not any(found):
        raise ValueError(f"{path} is empty; write an entry a line")
    return found


def _opened_file(path: str | Path) -> Any:
    from PIL import Image

    return Image.open(path)


def _folder(folder: Path, classes: Sequence[str] | None) -> Pictures:
    named = sorted(each.name for each in folder.iterdir() if each.is_dir())
    files = [
        (file, name)
        for name in named
        for file in sorted((folder / name).rglob("*"))
        if file.suffix.lower() in _PICTURES
    ]
    if not files:
        raise ValueError(
            f"{folder} holds no class folders with pictures ({', '.join(_PICTURES)}); give a "
            "folder of class folders, or a table of paths and labels"
        )
    empty = sorted(set(named) - {name for _, name in files})
    if classes is None and empty:
        raise ValueError(
            f"{folder}: the class folders {', '.join(empty[:5])} hold no picture; remove them, or "
            "name the head's classes in --class-names"
        )
    paths = [str(file) for file, _ in files]
    return Pictures(
        str(folder),
        paths,
        [name for _, name in files],
        lambda i: _opened_file(paths[i]),
        classes=classes,
    )


def _table(path: Path, options: DataOptions, classes: Sequence[str] | None) -> Pictures:
    columns = _columns(path)
    if not next(iter(columns.values()), None):
        raise ValueError(f"{path} has no rows; write a header and a row for each picture")
    for option, name in (("path", options.path_column), ("label", options.label_column)):
        if name not in columns:
            raise ValueError(
                f"{path}, line 1: there is no column {name!r} among {', '.join(columns)}; name it "
                f"with --{option}-column"
            )
    root, by_id = options.root or path.parent, options.id_column or options.path_column
    if by_id not in columns:
        raise ValueError(f"{path} has no column {by_id!r} among {', '.join(columns)}; correct it")
    files = [str(each) for each in columns[options.path_column]]
    labels = columns[options.label_column]
    for number, (name, label) in enumerate(zip(files, labels, strict=True), 2):
        if label in (None, ""):
            raise ValueError(f"{path}, line {number}: {name} has no label; write one")
        if not (root / name).is_file():
            raise ValueError(
                f"{path}, line {number}: {root / name} is no file; correct the path, or say with "
                "--root what paths are relative to"
            )
    if all(str(label).isdigit() for label in labels):
        labels = [int(label) for label in labels]
    return Pictures(
        str(path),
        [str(each) for each in columns[by_id]],
        labels,
        lambda i: _opened_file(root / files[i]),
        classes=classes,
        columns=columns,
    )


def _columns(path: Path) -> dict[str, list[Any]]:
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError as missing:
            raise ValueError(f"{path} needs pyarrow: pip install pyarrow") from missing
        try:
            found: dict[str, list[Any]] = parquet.read_table(path).to_pydict()
        except Exception as reason:  # pyarrow has several, none for a damaged file alone
            raise ValueError(f"{path} cannot be read as Parquet: {str(reason)[:100]}") from reason
        return found
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as reason:
        words = getattr(reason, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"{path} cannot be read: {words}; give a table of paths") from reason
    rows = list(csv.reader(text.splitlines(), delimiter="\t" if path.suffix == ".tsv" else ","))
    header = rows[0] if rows else []
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(header):
            raise ValueError(
                f"{path}, line {number}: {len(row)} fields, {len(header)} in the header; correct it"
            )
    return {name: [row[i] for row in rows[1:]] for i, name in enumerate(header)}


def _hugging_face(
    folder: Path, split: str | None, options: DataOptions, classes: Sequence[str] | None
) -> Pictures:
    try:
        import datasets
    except ImportError as missing:
        raise ValueError(f"{folder} needs datasets: pip install datasets") from missing
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as reason:  # it has several, none for a damaged folder alone
        raise ValueError(f"{folder} cannot be read by datasets: {str(reason)[:100]}") from reason
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise ValueError(
                f"{folder} has the splits {', '.join(found)}; write {folder}:{next(iter(found))}"
            )
        found = found[split]
    images = [n for n, f in found.features.items() if isinstance(f, datasets.Image)]
    image = options.path_column if options.path_column in found.features else None
    image = image or (images[0] if len(images) == 1 else None)
    label = options.label_column
    if image is None or label not in found.features:
        raise ValueError(
            f"{folder} has the columns {', '.join(found.features)}; name the pictures' with "
            "--path-column and the labels' with --label-column"
        )
    kept = [name for name in found.column_names if name != image]
    columns = {name: list(found[name]) for name in kept}
    names, by_id = [str(i) for i in range(len(found))], options.id_column
    if by_id is not None:
        if by_id not in columns:
            raise ValueError(
                f"{folder} has no column {by_id!r} among {', '.join(kept)}; correct it"
            )
        names = [str(each) for each in columns[by_id]]
    known = getattr(found.features[label], "names", None)
    labels = columns[label] if known is None else [known[i] for i in columns[label]]
    return Pictures(
        str(folder),
        names,
        labels,
        lambda i: found[i][image],
        classes=classes or known,
        columns=columns,
        files=by_id is not None,
    )


def _torchvision(name: str, options: DataOptions, classes: Sequence[str] | None) -> Pictures:
    import torchvision.datasets

    name, _, split = name.partition(":")
    kind = getattr(torchvision.datasets, name, None)
    if kind is None or options.root is None:
        words = f"torchvision has no data set {name!r}" if kind is None else "--root is missing"
        raise ValueError(f"{words}; write torchvision:CIFAR10 and --root FOLDER where it lies")
    try:
        found = kind(str(options.root), train=split != "test", download=False)
    except (TypeError, RuntimeError, OSError) as reason:
        raise ValueError(
            f"torchvision cannot read {name} in {options.root}: {str(reason)[:100]}; download it"
        ) from reason
    targets = [int(each) for each in found.targets]
    known = getattr(found, "classes", None)
    return Pictures(
        f"torchvision:{name}",
        [str(i) for i in range(len(targets))],
        targets if known is None else [known[i] for i in targets],
        lambda i: found[i][0],
        classes=classes or known,
        files=False,
    )


def _in_order(names: set[str]) -> list[str]:
    """The names as torchvision's ImageFolder orders them, if timm's does so too."""
    found = sorted(names)
    by_number = {n: re.sub(r"\d+", lambda m: m[0].zfill(20), n.lower()) for n in names}
    of_timm = sorted(names, key=lambda name: by_number[name])
    if found != of_timm:
        at = next(i for i, name in enumerate(found) if name != of_timm[i])
        raise ValueError(
            f"which class is number {at} is not clear: {found[at]!r} for torchvision, "
            f"{of_timm[at]!r} for timm; name the classes in the head's order in --class-names"
        )
    return found


def _indices(
    where: str, names: Sequence[str], labels: Sequence[Any], classes: Sequence[str] | None
) -> tuple[list[str] | None, list[int]]:
    """The names of the classes in the head's order, None where labels are indices; the indices."""
    if all(isinstance(label, int) for label in labels) and classes is None:
        return None, list(labels)
    known = list(classes or _in_order({str(label) for label in labels}))
    table = {name: index for index, name in enumerate(known)}
    found = []
    for name, label in zip(names, labels, strict=True):
        index = label if isinstance(label, int) else table.get(str(label))
        if index is None or not 0 <= index < len(known):
            raise ValueError(
                f"{where}: {name} has the class {label!r}, which is none of the {len(known)} of "
                f"the head ({', '.join(known[:4])}, ...); correct it, or name them in --class-names"
            )
        found.append(index)
    return known, found

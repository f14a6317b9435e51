"""Images of data sets that tensorflow-datasets (TFDS) has prepared; TensorFlow itself is not needed."""

import os
import re
import zlib
from typing import Any

import numpy as np
from jaxtyping import UInt8

from zipir_jax.data.sources import read_headers
from zipir_jax.imageio import read_image_uint8, upright_size

# A version belongs to the name: tfds:coco/2017:1.1.0:validation.
SPEC = re.compile(r"tfds:(?P<name>[^:]+(?::\d+\.\d+\.\d+)?)(?::(?P<split>.+))?")


class TfdsRecords:
    """The encoded images of `tfds:NAME[:SPLIT]`, prepared in TFDS_DATA_DIR or TFDS's own folder; nothing is downloaded.

    Raises ValueError where the spec is of another form, where tensorflow-datasets is not installed, or where the data
    set is unknown, not prepared, without that split, without an image, or in files without random access.
    """

    def __init__(self, spec: str):
        parts = SPEC.fullmatch(spec)
        if not parts:
            raise ValueError(f"{spec}: not of the form tfds:NAME or tfds:NAME:SPLIT.")
        self.name = spec
        self.split = parts["split"] or "train"
        builder, self._image, self._caption = _open_builder(spec, parts["name"], self.split)
        self._records = _open_records(spec, builder, self.split, self._image)
        self.full_name = builder.info.full_name

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["name"])

    def __len__(self) -> int:
        return len(self._records)

    def encoded(self, index: int) -> bytes:
        """The bytes of the image's file."""
        return self._read(index)[self._image]

    def caption(self, index: int) -> str:
        """What the data set's "caption" or else "text" says of the image; "" where it has neither."""
        if self._caption is None:
            return ""
        return self._read(index)[self._caption].decode("utf-8", "replace").strip()

    def image_name(self, index: int) -> str:
        """Its number: a TFDS example has no name."""
        return f"{self.name} image {index}"

    def _read(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} does not lie within 0 to {len(self) - 1}.")
        try:
            return self._records[int(index)]
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{self.image_name(index)}: the record is damaged ({_line(error)})") from None

    def __repr__(self) -> str:
        return f"TfdsRecords({self.full_name}, {self.split}, {len(self)} images)"


class TfdsSource:
    """The images of `tfds:NAME[:SPLIT]`. Raises as `TfdsRecords`, and where no image can be read.

    An example has to be read as a whole for its image's header: at the start the data set is read once.
    """

    def __init__(self, spec: str):
        records = TfdsRecords(spec)
        checksums = np.zeros(len(records), np.uint32)

        def size(index):
            data = records.encoded(index)
            checksums[index] = zlib.crc32(data)
            return upright_size(records.image_name(index), data)

        readable, self.sizes, self.damaged = read_headers(len(records), size)
        if not readable:
            raise ValueError(f"{spec}: none of its {len(records)} images can be read")
        self.name = spec
        self._records, self._numbers = records, readable
        self._digest = f"{zlib.crc32(checksums[readable].tobytes()):08x}"

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        number = self._numbers[index]
        return read_image_uint8(self._records.image_name(number), self._records.encoded(number))

    def caption(self, index: int) -> str:
        return self._records.caption(self._numbers[index])

    def __repr__(self) -> str:
        records = self._records
        return f"TfdsSource({records.full_name}, {records.split}, {len(self)} images, {self._digest})"


def _open_builder(spec, name, split):
    """TFDS's builder, the name of its image feature, and that of its caption or None."""
    try:
        import tensorflow_datasets as tfds
    except ModuleNotFoundError as error:
        if error.name != "tensorflow_datasets":
            raise
        raise ValueError(f"{spec}: needs tensorflow-datasets: pip install zipir_jax[tfds]") from None
    data_dir = os.environ.get("TFDS_DATA_DIR")  # TFDS looks at it when it is imported, and never again
    place = data_dir or "TFDS's folder (TFDS_DATA_DIR)"
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        raise ValueError(f"{spec}: TFDS knows no such data set, and there is none in {place}") from None
    except Exception as error:  # whatever the data set's own code does
        raise ValueError(f"{spec}: TFDS cannot open it ({_line(error)})") from None
    if not builder.info.splits:
        raise ValueError(f"{spec}: not prepared in {place}: run tfds build {name} --file_format=array_record")
    if split.isidentifier() and split not in builder.info.splits:
        known = ", ".join(builder.info.splits)
        raise ValueError(f"{spec}: has no split {split!r}; it has {known}")
    features = builder.info.features
    images = [key for key in features if type(features[key]) is tfds.features.Image]
    if not images:
        raise ValueError(f"{spec}: has no image among its features ({', '.join(features)})")
    texts = {key for key in features if isinstance(features[key], tfds.features.Text)}
    captions = [key for key in ("caption", "text") if key in texts]
    return builder, "image" if "image" in images else images[0], (captions or [None])[0]


def _open_records(spec, builder, split, image):
    import tensorflow_datasets as tfds

    try:
        # Our own reader decodes the pixels: it knows of orientation, 16 bits, and which file is at fault.
        return builder.as_data_source(split=split, decoders={image: tfds.decode.SkipDecoding()})
    except NotImplementedError:
        form = builder.info.file_format.value
        raise ValueError(
            f"{spec}: stored as {form}, without random access; prepare it with --file_format=array_record"
        ) from None
    except Exception as error:  # a malformed split, a missing file
        raise ValueError(f"{spec}: TFDS cannot open it ({_line(error)})") from None


def _line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]

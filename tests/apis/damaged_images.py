"""Images that cannot be used, beside some that can."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

# Names, and a word of the line that says what is wrong.
DAMAGED = {
    "b_half.jpg": "half.jpg",
    "c_half.png": "half.png",
    "d_empty.jpg": "is empty",
    "e_text.jpg": "is no image",
    "f_thin.png": "has 1 x 5000 pixels, too thin",
    "g_flat.png": "has 5000 x 1 pixels, too thin",
    "h_bomb.png": "has 20000 x 20000 pixels, more than --max-pixels",
    "i_gone.png": "does not exist",
}
USABLE = ("a_first.png", "j_moving.webp", "k_cmyk.jpg", "l_16_bits.png", "m_one_pixel.png", "n_last.jpg")


def write_images(folder: Path) -> Path:
    """Write a folder with all of these, in alphabetical order, and a folder that has the name of an image."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    for name in ("a_first.png", "n_last.jpg"):
        picture.save(folder / name)
    picture.save(folder / "j_moving.webp", save_all=True, append_images=[picture.rotate(180)])
    picture.convert("CMYK").save(folder / "k_cmyk.jpg")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 256).save(folder / "l_16_bits.png")
    picture.resize((1, 1)).save(folder / "m_one_pixel.png")
    for name, kind in (("b_half.jpg", "JPEG"), ("c_half.png", "PNG")):
        stream = io.BytesIO()
        picture.save(stream, kind)
        (folder / name).write_bytes(stream.getvalue()[: stream.tell() // 2])
    (folder / "d_empty.jpg").touch()
    (folder / "e_text.jpg").write_text("hello")
    picture.resize((1, 5000)).save(folder / "f_thin.png")
    picture.resize((5000, 1)).save(folder / "g_flat.png")
    (folder / "h_bomb.png").write_bytes(_header_only(20000, 20000))
    (folder / "i_gone.png").symlink_to("no_such_file")
    (folder / "o_folder.png").mkdir()
    return folder


def _header_only(width: int, height: int) -> bytes:
    """A PNG file of this size without any pixels: decoding it fails."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def check_problems(problems: dict[Path, str], folder: Path) -> None:
    """Compare what was said of the images of :func:`write_images`."""
    assert [file.name for file in problems] == list(DAMAGED)
    for file, line in problems.items():
        assert str(folder / file.name) in line
        assert DAMAGED[file.name] in line
        assert "\n" not in line
        assert "annotation" not in line

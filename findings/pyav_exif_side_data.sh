#!/usr/bin/env bash
# PyAV 17.1 and 18.1 cannot give the side data of a picture that has EXIF: `frame.side_data` raises "31 is not a valid
# Type" for a plain JPEG with an orientation tag, as phones write them. 16.1 and 19.0 give it, so the orientation of a
# photograph can be read with them.
#
# Why: FFmpeg 8 has a type of side data for EXIF, and the enumeration of these PyAV releases ends before it.
#
# Needs Python 3.11 (PYTHON=...), which all four releases have wheels for but 19.0.2 (3.12 and newer: PYTHON312=..., left
# out if there is none), and a network; the packages go into a folder that is removed.
# Exit status: 0 if the behaviour is as stated, 1 if it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/side_data.py" <<'PYTHON'
import sys

import av
from PIL import Image

path, raises = sys.argv[1], sys.argv[2] == "raises"
exif = Image.Exif()
exif[0x0112] = 6  # orientation: a quarter turn
Image.new("RGB", (64, 48), (200, 30, 30)).save(path, exif=exif)
with av.open(path) as container:
    frame = next(container.decode(video=0))
    try:
        found = f"{len(list(frame.side_data.keys()))} entries"
    except ValueError as error:
        found = f"ValueError: {error}"
print(f"PyAV {av.__version__}: {found}")
sys.exit(found.startswith("ValueError: 31 is not a valid Type") is not raises)
PYTHON

run() {  # interpreter, version of PyAV, what is expected
  "$1" -m venv "$folder/$2"
  "$folder/$2/bin/python" -m pip install -q --no-deps "av==$2" numpy==2.4.6 pillow==12.3.0
  "$folder/$2/bin/python" "$folder/side_data.py" "$folder/photo.jpg" "$3"
}
status=0
run "${PYTHON:-python3}" 16.1.0 gives || status=1
run "${PYTHON:-python3}" 17.1.0 raises || status=1
run "${PYTHON:-python3}" 18.1.0 raises || status=1
newer=${PYTHON312:-$(command -v python3.13 || command -v python3.12 || true)}
if [ -n "$newer" ] && "$newer" -c '' 2>/dev/null; then run "$newer" 19.0.2 gives || status=1; fi
[ "$status" = 0 ] && echo "as stated" || echo "NOT as stated"
exit "$status"

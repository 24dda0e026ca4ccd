"""`focus track`: follow objects through a clip, or edit the clip with one instruction."""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.commands import options

if TYPE_CHECKING:
    from engine.video_files import VideoClip
    from focus import Focus
    from focus.regions import Region

HELP = "follow objects through a clip by words, regions of one frame or classes; or edit the clip"
EXAMPLES = (
    'focus track clip.mp4 "the red circle"',
    "focus track frames/ --click 40,60 --frame 12",
    'focus track clip.gif --classes "red circle, blue star"',
    'focus track clip.mp4 --edit "make <region> blue" --box 20,30,60,80',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("clip", metavar="CLIP", help="a video file, a GIF or a folder of pictures")
    parser.add_argument("text", metavar="TEXT", nargs="?", help="an expression to find")
    parser.add_argument("--classes", metavar="NAMES", help="class names, by commas")
    parser.add_argument("--edit", metavar="TEXT", help="edit every frame as this text says")
    parser.add_argument(
        "--frame",
        type=options.whole(0, 1_000_000),
        default=0,
        metavar="N",
        help="frame that the regions are on, counted from 0 (%(default)s)",
    )
    parser.add_argument(
        "--every",
        type=options.whole(1, 1000),
        default=1,
        metavar="N",
        help="read one frame in N (%(default)s)",
    )
    parser.add_argument(
        "--limit",
        type=options.whole(1, 4096),
        default=256,
        metavar="N",
        help="read at most N frames (%(default)s)",
    )
    options.add_regions(parser, many=True)
    options.add_model(parser, "out/track")


def run(args: argparse.Namespace) -> int:
    """Track or edit one clip; write a clip, masks and a report."""
    _check(args)
    from engine.pictures import write_json
    from engine.video_files import check_frames, check_writable, read_clip, write_clip

    name = options.stem(Path(args.clip).stem)
    what = "tracked" if args.edit is None else "edited"
    path = check_writable(args.out / f"{name}.{what}{_suffix(Path(args.clip))}")
    check_frames(args.out / f"{name}.mask-1")
    clip = read_clip(args.clip, every=args.every, limit=args.limit)
    if args.frame >= len(clip.frames):
        raise options.UsageError(f"--frame: 0 to {len(clip.frames) - 1} expected, got {args.frame}")
    regions = _regions(args, clip)
    model = options.load_model(args.model, args.backend)
    start = time.perf_counter()
    if args.edit is not None:
        frames, found = _edit(args, model, clip, regions)
    else:
        frames, found = _track(args, model, clip, regions)
    report = {
        "command": "track",
        "model": args.model,
        "clip": args.clip,
        "frames": len(clip.frames),
        "fps": clip.fps,
        "text": args.edit or args.text or args.classes,
        "regions": options.region_report(args.regions),
        "frame": args.frame,
        "seed": args.seed,
        **found,
        "written": write_clip(path, frames, clip.fps),
        "seconds": round(time.perf_counter() - start, 3),
    }
    saved = write_json(report, args.out / f"{name}.json")
    lines = [
        f"{item['name']}: seen in {item['seen']} of {len(clip.frames)} frames, {item['masks']}"
        for item in found["objects"]
    ]
    lines.append(f"{report['written']} ({report['seconds']:.2f} s)")
    return options.reply({**report, "report": saved}, lines, args.json)


def _suffix(clip: Path) -> str:
    """Return the format of the clip that is written: the one read, where we can write it."""
    from engine.video_files import VIDEOS

    if clip.is_dir():
        return ".gif"
    return clip.suffix if clip.suffix.lower() in (*VIDEOS, ".gif") else ".mp4"


def _check(args: argparse.Namespace) -> None:
    """Check and strip what is asked for; an empty text is an error, not another question."""
    for name, what in (("text", "TEXT"), ("classes", "--classes"), ("edit", "--edit")):
        if getattr(args, name) is not None:
            setattr(args, name, options.check_text(getattr(args, name), what))
    given = [args.text is not None, args.classes is not None, bool(args.regions)]
    if args.edit is not None:
        if given[0] or given[1] or len(args.regions or ()) > 1:
            raise options.UsageError("--edit takes its text and at most one region")
    elif sum(given) != 1:
        raise options.UsageError("give one of TEXT, --classes or regions such as --click 40,60")
    elif args.classes is not None and not _classes(args.classes):
        raise options.UsageError(f"--classes: names by commas expected, got {args.classes!r}")


def _classes(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _regions(args: argparse.Namespace, clip: VideoClip) -> list[Region]:
    from PIL import Image

    from engine.pictures import Picture

    picture = Picture(image=Image.fromarray(clip.frames[args.frame]), path=Path(args.clip))
    return options.read_regions(args.regions, picture)


def _edit(
    args: argparse.Namespace, model: Focus, clip: VideoClip, regions: list[Region]
) -> tuple[list[Any], dict[str, Any]]:
    import numpy as np

    region = regions[0] if regions else None
    results = model.edit_clip(clip.frames, args.edit, region, args.frame, seed=args.seed)
    return [np.asarray(result.image) for result in results], {"objects": []}


def _track(
    args: argparse.Namespace, model: Focus, clip: VideoClip, regions: list[Region]
) -> tuple[list[Any], dict[str, Any]]:
    import numpy as np
    from PIL import Image

    from engine.pictures import write_mask
    from engine.show import overlay
    from engine.video_files import check_frames
    from focus.folder import fresh_folder

    tracks = model.track(
        clip.frames,
        text=args.text,
        regions=regions or None,
        start=args.frame,
        classes=_classes(args.classes) if args.classes is not None else None,
        seed=args.seed,
    )
    frames = [
        np.asarray(
            overlay(Image.fromarray(frame), [masks[t] for masks in tracks.masks], enlarge=False)
        )
        for t, frame in enumerate(clip.frames)
    ]
    name = options.stem(Path(args.clip).stem)
    objects = []
    for number, (label, masks) in enumerate(zip(tracks.names, tracks.masks, strict=True), 1):
        folder = args.out / f"{name}.mask-{number}"
        check_frames(folder)
        with fresh_folder(folder) as fresh:
            for t, mask in enumerate(masks):
                write_mask(mask, fresh / f"{t:05d}.png")
        seen = sum(bool(mask.any()) for mask in masks)
        scores = tracks.scores[number - 1]
        objects.append({"name": label, "seen": seen, "scores": scores, "masks": folder})
    _drop_stale(args.out, name, len(objects))
    return frames, {"objects": objects}


def _drop_stale(out: Path, name: str, count: int) -> None:
    """Remove mask folders of an earlier run that found more objects; others' files stay."""
    from engine.video_files import VideoError, check_frames

    number = count + 1
    while (folder := out / f"{name}.mask-{number}").is_dir():
        try:
            check_frames(folder)
        except VideoError:
            return
        shutil.rmtree(folder)
        number += 1

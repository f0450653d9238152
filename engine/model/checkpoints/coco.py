"""The classes of COCO (Lin et al., 2014), as the published checkpoints order them."""

__all__ = ["COCO_CATEGORY_IDS", "COCO_NAMES", "coco_by_id"]

# The ids that the annotations use, in order; the gaps are categories that were planned and dropped.
COCO_CATEGORY_IDS = tuple(i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))

_NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
)
COCO_NAMES = tuple(_NAMES.split(","))


def coco_by_id() -> tuple[str, ...]:
    """Ninety names, that of category id ``i`` at ``i - 1``; the gaps are called ``"N/A 12"`` and so on."""
    names = dict(zip(COCO_CATEGORY_IDS, COCO_NAMES, strict=True))
    return tuple(names.get(i, f"N/A {i}") for i in range(1, 91))

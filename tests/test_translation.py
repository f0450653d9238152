"""The project's ops in models of others, as ONNX."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from trimask.export import translations  # noqa: E402
from trimask.kernels import MultiScaleRoIAlign, batched_nms, nms, pyramid_roi_align, roi_align  # noqa: E402


class Keep(nn.Module):
    def forward(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return nms(boxes, scores, 0.5), batched_nms(boxes, scores, labels, 0.5)


class Pool(nn.Module):
    def forward(self, fine: Tensor, coarse: Tensor, boxes: Tensor) -> tuple[Tensor, ...]:
        flat = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], 1)
        single = [roi_align(fine, flat, (2, 3), 0.25, ratio, aligned) for ratio in (0, 2) for aligned in (False, True)]
        lists = MultiScaleRoIAlign(["a", "b"], 3, 2, canonical_scale=40)
        rule = {"sampling_ratio": 2, "aligned": True, "canonical_size": 40}
        return (
            *single,
            roi_align(fine, [boxes], 2, 0.25, 1),
            lists({"a": fine, "b": coarse}, [boxes], [(100, 100)]),
            pyramid_roi_align([fine, coarse], boxes[None].double(), [4, 8], 3, **rule),
        )


def random_boxes(rng: torch.Generator, count: int) -> Tensor:
    low = torch.rand(count, 2, generator=rng) * 60
    return torch.cat([low, low + 2 + torch.rand(count, 2, generator=rng) * 40], 1)


def run(module: nn.Module, example: tuple[Tensor, ...], shapes: tuple, given: tuple[Tensor, ...]) -> list[np.ndarray]:
    module.eval()
    with torch.no_grad():
        program = torch.onnx.export(
            module, example, dynamo=True, dynamic_shapes=shapes, custom_translation_table=translations(), verbose=False
        )
    assert {node.domain for node in program.model.graph} == {""}
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, (x.numpy() for x in given), strict=True)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.float32, torch.float16])
def test_suppression(rng: torch.Generator, dtype: torch.dtype) -> None:
    def arguments(count: int) -> tuple[Tensor, ...]:
        labels = torch.randint(-3, 3, (count,), generator=rng).to(dtype)
        boxes = random_boxes(rng, count)
        boxes[1::3], labels[1::3] = boxes[::3][: len(boxes[1::3])] + 0.1, labels[::3][: len(labels[1::3])]
        boxes[2::3] = boxes[::3][: len(boxes[2::3])]  # of any class
        return boxes, torch.rand(count, generator=rng), labels

    n = torch.export.Dim("n", min=2, max=1000)
    given = arguments(70)
    found = run(Keep(), arguments(9), ({0: n}, {0: n}, {0: n}), given)
    for ours, expected in zip(found, Keep()(*given), strict=True):
        assert 0 < len(expected) < 70
        assert ours.tolist() == expected.tolist()
    assert len(found[0]) < len(found[1])


def test_pooling(rng: torch.Generator) -> None:
    maps = torch.randn(1, 3, 25, 25, generator=rng), torch.randn(1, 3, 13, 13, generator=rng)
    n = torch.export.Dim("n", min=2, max=1000)
    given = *maps, random_boxes(rng, 31)
    found = run(Pool(), (*maps, random_boxes(rng, 5)), (None, None, {0: n}), given)
    for ours, expected in zip(found, Pool()(*given), strict=True):
        assert expected.abs().max() > 0.5
        np.testing.assert_allclose(ours, expected.numpy(), atol=2e-5)


def test_a_maximum_is_refused(rng: torch.Generator) -> None:
    class Largest(nn.Module):
        def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
            return roi_align(x, [boxes], 2, mode="max")

    with pytest.raises(torch.onnx.errors.OnnxExporterError, match='expected mode "avg", which alone is exported'):
        run(Largest(), (torch.zeros(1, 3, 8, 8), random_boxes(rng, 3)), (None, None), ())

"""Copies to the host: values, ownership, order, memory. On a CPU always; on a GPU where there is one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from train.transfer import HostCopies, HostCopy, downloaded, pinned, uploaded

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shared", [True, False])
def test_values_arrive_contiguous_whatever_their_strides(device: str, shared: bool) -> None:
    packed = torch.randn(2, 5, 3, 4, 8, device=device)  # [image, token, q k v, head, dim]
    query = packed.permute(2, 0, 3, 1, 4)[0]
    arrived = HostCopies(device).start(query, shared=shared).wait()
    assert arrived.device.type == "cpu"
    assert arrived.is_contiguous()
    assert torch.equal(arrived, query.cpu())
    assert arrived.untyped_storage().nbytes() == arrived.nbytes, "the packed rest is not kept"


def test_on_a_cpu_the_models_memory_is_copied_and_ones_own_is_not() -> None:
    copies = HostCopies("cpu")
    values = torch.zeros(8)
    shared, own = copies.start(values, shared=True), copies.start(values)
    values += 1
    assert (shared.wait() == 0).all()
    assert own.wait().data_ptr() == values.data_ptr()


@pytest.mark.parametrize("device", DEVICES)
def test_copies_are_waited_for_in_any_order_and_thread(device: str) -> None:
    copies = HostCopies(device)
    arriving = [copies.start(torch.full((64, 64), float(layer), device=device)) for layer in range(12)]
    with ThreadPoolExecutor(4) as pool:
        arrived = list(pool.map(HostCopy.wait, reversed(arriving)))
    assert [int(values[0, 0]) for values in arrived] == list(reversed(range(12)))


@pytest.mark.parametrize("device", DEVICES)
def test_many_small_tensors_arrive_in_order(device: str) -> None:
    shapes = [((2, 3), torch.float64), ((2, 3), torch.int64), ((2, 4), torch.float64), ((), torch.int64)] * 3
    tensors = [torch.full(shape, i, dtype=dtype, device=device) for i, (shape, dtype) in enumerate(shapes)]
    arrived = HostCopies(device).start_all(tensors).wait()
    assert all(torch.equal(one, other.cpu()) for one, other in zip(arrived, tensors, strict=True))
    assert [(tuple(one.shape), one.dtype) for one in arrived] == shapes
    assert HostCopies(device).start_all([]).wait() == []


def test_gradients_do_not_follow() -> None:
    values = torch.ones(3, requires_grad=True)
    assert not HostCopies("cpu").start(2 * values).wait().requires_grad


def test_a_tensor_from_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match="values are on meta, expected cpu"):
        HostCopies("cpu").start(torch.empty(2, device="meta"))


def test_pinning_is_for_gpus() -> None:
    values = torch.ones(3)
    assert pinned(values, "cpu") is values
    assert uploaded(values, "cpu") is values


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_go_up_and_come_down(device: str) -> None:
    values = torch.tensor([1.5, -2.0, float("inf")], dtype=torch.float64)
    assert torch.equal(downloaded(uploaded(values, device)).wait(), values)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_the_copy_follows_the_work_and_the_work_does_not_wait() -> None:
    """The tensor is dropped at once and its memory asked for again; the copy still brings what was computed."""
    copies = HostCopies("cuda")
    factor = torch.randn(2048, 2048, device="cuda") / 2048**0.5
    for turn in range(8):
        product = factor
        for _ in range(20):
            product = product @ factor
        expected = product.half()
        arriving = copies.start(product, torch.float16)
        del product
        torch.full((2048, 2048), float("nan"), device="cuda")  # would reuse the block were it free
        arrived = arriving.wait()
        assert arrived.is_pinned()
        assert torch.equal(arrived, expected.cpu()), turn
    torch.cuda.synchronize()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_memory_is_given_back() -> None:
    copies = HostCopies("cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    arriving = [copies.start(torch.ones(1 << 20, device="cuda")) for _ in range(8)]
    for copy in arriving:
        copy.wait()
    torch.cuda.synchronize()
    one = torch.empty(1, device="cuda")  # asked for memory, the allocator takes back what has been copied
    assert torch.cuda.memory_allocated() <= before + 512 * one.numel()

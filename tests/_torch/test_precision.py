"""Full precision inside, the user's own setting outside."""

import threading
from functools import partial

import pytest
import torch

from whiten_layers._torch.precision import _fp32_precisions, full_precision

by_backend = pytest.mark.skipif(
    None in _fp32_precisions(), reason="torch has one precision for all backends before 2.9"
)


@pytest.fixture(autouse=True)
def put_back():
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_the_users_setting_is_put_back(setting):
    torch.set_float32_matmul_precision(setting)
    tf32, before = torch.backends.cuda.matmul.allow_tf32, _fp32_precisions()
    with pytest.raises(ZeroDivisionError), full_precision():
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32
        _ = 1 / 0
    assert torch.get_float32_matmul_precision() == setting
    assert torch.backends.cuda.matmul.allow_tf32 == tf32
    assert _fp32_precisions() == before


@by_backend
@pytest.mark.parametrize("setting", [("tf32", "ieee"), ("ieee", "bf16"), ("tf32", "bf16")])
def test_a_setting_for_each_backend_is_put_back(setting):
    torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = setting
    with full_precision():
        assert _fp32_precisions() == ["ieee", "ieee"]
        assert not torch.backends.cuda.matmul.allow_tf32
    assert _fp32_precisions() == list(setting)


@pytest.mark.parametrize("setting", ["highest", "medium"])
def test_products_inside_are_exact_to_float32(setting):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = (a.double() @ b.double()).float()
    torch.set_float32_matmul_precision(setting)  # "medium": bf16 where the processor has it
    with full_precision():
        torch.testing.assert_close(a @ b, exact, rtol=1e-5, atol=1e-4)


def test_threads_that_overlap_have_full_precision_until_the_last_has_left():
    torch.set_float32_matmul_precision("medium")
    inside, seen = threading.Barrier(4, timeout=60), []

    def first():
        for _ in range(50):
            with full_precision():
                inside.wait()  # all four are in
            inside.wait()  # the first has left
            seen.append(torch.get_float32_matmul_precision())
            inside.wait()  # all have looked

    def others():
        for _ in range(50):
            with full_precision():
                inside.wait()
                inside.wait()
                seen.append(torch.get_float32_matmul_precision())
                inside.wait()

    threads = [threading.Thread(target=work) for work in (first, others, others, others)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(seen) == {"highest"} and len(seen) == 50 * 4
    assert torch.get_float32_matmul_precision() == "medium"


@by_backend
def test_a_setting_that_a_backend_inherits_stays_inherited():
    for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        backend.fp32_precision = "none"
    set_generic = partial(torch._C._set_fp32_precision_setter, "generic", "all")  # torch.backends.fp32_precision
    try:
        set_generic("tf32")
        with full_precision():
            assert _fp32_precisions() == ["ieee", "ieee"]
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        set_generic("ieee")
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        set_generic("none")

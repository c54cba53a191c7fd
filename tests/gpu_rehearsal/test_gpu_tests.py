"""The tests that need a GPU, on a pretended one, so that on a real one none fails by a fault of its own."""

from __future__ import annotations

import threading

import pytest
import test_gpu
from pretended_cuda import PretendedCUDA

LEFT_TO_A_GPU = {
    # They measure or fill its memory, or start processes, which would not see the pretended one.
    "test_a_gpu_that_is_full_halves_the_micro_batch",
    "test_memory_of_a_run_is_what_was_foreseen",
    "test_every_gpu_has_an_engine_of_its_own_behind_one_address",
    "test_every_gpu_configuration_gives_the_same_adapter",
    # They take long on a CPU; the rehearsal has the like in small.
    "test_equal_deterministic_runs_are_equal_to_the_bit_and_so_is_one_that_is_resumed",
    "test_a_run_learns_through_the_kernel_of_the_cross_entropy_what_it_learns_without",
    "test_fast_steps_give_the_gradients_of_the_library_path",
    "test_cross_entropy_by_the_kernel_is_that_by_torch",
}
TAKEN = {name: test for name, test in vars(test_gpu).items() if name.startswith("test_") and name not in LEFT_TO_A_GPU}
pytestmark = pytest.mark.filterwarnings("default")  # as there
globals().update(TAKEN | {name: vars(test_gpu)[name] for name in ("recipe", "two_adapters")})


@pytest.fixture(autouse=True)
def threads_see_it(cuda: PretendedCUDA, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine computes in a thread of its own."""
    run = threading.Thread.run

    def inside(thread: threading.Thread) -> None:
        with cuda:
            run(thread)

    monkeypatch.setattr(threading.Thread, "run", inside)


def test_what_is_left_out_is_there() -> None:
    assert set(vars(test_gpu)) > LEFT_TO_A_GPU and len(TAKEN) >= 10

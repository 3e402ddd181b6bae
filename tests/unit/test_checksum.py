"""Every implementation of the checksums against published vectors, independent packages, and each other.

The packages are PyPI's ``blake3`` and ``crc32c``. What reads or writes past its buffers is found by putting them
against pages that may not be touched.
"""

from __future__ import annotations

import ctypes
import mmap
import random
import subprocess
import sys
import threading
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import blake3
import crc32c
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from transport import checksum

KEY = b"whats the Elvish word for friend"
RANDOM = random.Random(20240229).randbytes(3 << 20)

IMPLEMENTATIONS = checksum.implementations()
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)

# RFC 3720, appendix B.4.
CRC32C_VECTORS = [
    (b"", 0),
    (b"123456789", 0xE3069283),
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(reversed(range(32))), 0x113FDB5C),
]

# https://github.com/BLAKE3-team/BLAKE3, test_vectors/test_vectors.json: keyed_hash, the first 32 bytes, of so many
# bytes counting up to 250 and again, with KEY.
BLAKE3_VECTORS = {
    0: "92b2b75604ed3c761f9d6f62392c8a9227ad0ea3f09573e783f1498a4ed60d26",
    1: "6d7878dfff2f485635d39013278ae14f1454b8c0a3a2d34bc1ab38228a80c95b",
    1023: "c951ecdf03288d0fcc96ee3413563d8a6d3589547f2c2fb36d9786470f1b9d6e",
    1024: "75c46f6f3d9eb4f55ecaaee480db732e6c2105546f1e675003687c31719c7ba4",
    1025: "357dc55de0c7e382c900fd6e320acc04146be01db6a8ce7210b7189bd664ea69",
    2048: "879cf1fa2ea0e79126cb1063617a05b6ad9d0b696d0d757cf053439f60a99dd1",
    2049: "9f29700902f7c86e514ddc4df1e3049f258b2472b6dd5267f61bf13983b78dd5",
    3072: "044a0e7b172a312dc02a4c9a818c036ffa2776368d7f528268d2e6b5df191770",
    3073: "68dede9bef00ba89e43f31a6825f4cf433389fedae75c04ee9f0cf16a427c95a",
    4096: "befc660aea2f1718884cd8deb9902811d332f4fc4a38cf7c7300d597a081bfc0",
    5121: "6ccf1c34753e7a044db80798ecd0782a8f76f33563accaddbfbb2e0ea4b2d024",
    7168: "b42835e40e9d4a7f42ad8cc04f85a963a76e18198377ed84adddeaecacc6f3fc",
    31744: "efa53b389ab67c593dba624d898d0f7353ab99e4ac9d42302ee64cbf9939a419",
    102400: "1c35d1a5811083fd7119f5d5d1ba027b4d01c0c6c49fb6ff2cf75393ea5db4a7",
}

# What the kernels do in one go, and where they change from one way to another: chunks, batches of 4, 8 and 16 of
# them, groups of 1024, and the CRC's 4 KiB and panels.
EDGES = [0, 1, 4, 8, 16, 64, 128, 256, 512, 1024, 2048, 4080, 4096, 8192, 9216, 16384, 17408, 30720, 31488, 65536]


def blake3_of_blocks(data: bytes, block_size: int, digest_size: int) -> bytes:
    starts = range(0, len(data), block_size)
    return b"".join(blake3.blake3(data[i : i + block_size], key=KEY).digest(length=32)[:digest_size] for i in starts)


def zeros_of_blocks(data: bytes, block_size: int) -> list[int]:
    return [int(not any(data[i : i + block_size])) for i in range(0, len(data), block_size)]


def digest_and_map(
    data: bytes | memoryview, block_size: int, digest_size: int, implementation: str
) -> tuple[bytes, list[int]]:
    blocks = checksum.block_count(len(data), block_size)
    digests, zeros = bytearray(blocks * digest_size), bytearray(b"\xaa" * blocks)
    done = checksum.digest_blocks_into(
        data, KEY, digests, zeros, block_size=block_size, digest_size=digest_size, implementation=implementation
    )
    assert done == blocks
    return bytes(digests), list(zeros)


class TestCrc32c:
    @every_implementation
    @pytest.mark.parametrize(("data", "expected"), CRC32C_VECTORS)
    def test_published_vectors(self, data: bytes, expected: int, implementation: str) -> None:
        assert checksum.crc32c(data, 0, implementation) == expected

    @every_implementation
    def test_every_short_length_at_every_alignment(self, implementation: str) -> None:
        for start in range(64):
            for length in range(0, 600, 1 if start < 2 else 13):
                data = memoryview(RANDOM)[start : start + length]
                assert checksum.crc32c(data, 0, implementation) == crc32c.crc32c(data), (start, length)

    @every_implementation
    @pytest.mark.parametrize("edge", EDGES)
    def test_around_the_lengths_where_the_method_changes(self, edge: int, implementation: str) -> None:
        for length in range(max(edge - 9, 0), edge + 10):
            data = memoryview(RANDOM)[3 : 3 + length]
            assert checksum.crc32c(data, 0xDEADBEEF, implementation) == crc32c.crc32c(data, 0xDEADBEEF), length

    @given(st.integers(0, 63), st.integers(0, 300_000), st.integers(0, 2**32 - 1), st.data())
    def test_any_split_continues(self, start: int, length: int, value: int, draw: st.DataObject) -> None:
        data = memoryview(RANDOM)[start : start + length]
        cut = draw.draw(st.integers(0, length))
        expected = crc32c.crc32c(data, value)
        for implementation in IMPLEMENTATIONS:
            first = checksum.crc32c(data[:cut], value, implementation)
            assert checksum.crc32c(data[cut:], first, implementation) == expected

    @pytest.mark.parametrize("value", [-1, 2**32, 2**64])
    def test_a_value_that_is_no_crc_is_refused(self, value: int) -> None:
        with pytest.raises(ValueError, match=r"value is not a CRC32C"):
            checksum.crc32c(b"", value)


class TestKeyedBlake3:
    @every_implementation
    @pytest.mark.parametrize("length", BLAKE3_VECTORS)
    def test_published_vectors(self, length: int, implementation: str) -> None:
        data = bytes(i % 251 for i in range(length))
        assert checksum.keyed_digest(KEY, data, implementation=implementation).hex() == BLAKE3_VECTORS[length]
        if length:
            digests, _ = digest_and_map(data, length, 32, implementation)
            assert digests.hex() == BLAKE3_VECTORS[length]

    @every_implementation
    def test_every_number_of_chunks_of_a_tree(self, implementation: str) -> None:
        for chunks in [*range(1, 70), 127, 128, 129, 1023, 1024, 1025, 2047, 2048, 2049, 3000]:
            for length in (1024 * chunks - 1, 1024 * chunks, 1024 * chunks + 1):
                data = RANDOM[:length]
                found = checksum.keyed_digest(KEY, data, implementation=implementation)
                assert found == blake3.blake3(data, key=KEY).digest(), length

    @every_implementation
    @pytest.mark.parametrize(
        ("block_size", "length"),
        [
            (1, 40),
            (64, 64 * 37),
            (1000, 33_333),
            (1024, 1024 * 33),
            (1025, 1025 * 20),
            (3 * 1024, 3 * 1024 * 35 + 1),
            (4096, 4096 * 100 + 4095),
            (5000, 123_456),
            (65536, 65536 * 17 + 1024),
            (65536, 65536),
            (65536, 100),
            (100 * 1024, 100 * 1024 * 11),
            (700 * 1024, 700 * 1024 * 3 + 7),
            (1 << 20, (2 << 20) + 5),
            ((1 << 20) + 1, (2 << 20) + 5),
            (checksum.BLOCK_SIZE_MAX, 3 << 20),
        ],
    )
    @pytest.mark.parametrize("digest_size", [16, 32])
    def test_blocks(self, block_size: int, length: int, digest_size: int, implementation: str) -> None:
        zeroed = bytearray(RANDOM[:length])
        for start in range(block_size, length, 5 * block_size):
            end = min(start + block_size, length)
            zeroed[start:end] = bytes(end - start)
        for data in (RANDOM[:length], bytes(zeroed), bytes(length)):
            digests, zeros = digest_and_map(data, block_size, digest_size, implementation)
            assert digests == blake3_of_blocks(data, block_size, digest_size)
            assert zeros == zeros_of_blocks(data, block_size)

    @given(
        start=st.integers(0, 63),
        length=st.integers(0, 200_000),
        block_size=st.one_of(st.integers(100, 20_000), st.sampled_from([1024, 4096, 16384, 65536])),
        holes=st.lists(st.tuples(st.integers(0, 200_000), st.integers(0, 70_000)), max_size=4),
    )
    @example(start=0, length=0, block_size=4096, holes=[])
    def test_all_implementations_agree_with_blake3(
        self, start: int, length: int, block_size: int, holes: list[tuple[int, int]]
    ) -> None:
        whole = bytearray(RANDOM[: start + length])
        for at, size in holes:
            end = min(at + size, len(whole))
            whole[at:end] = bytes(max(end - at, 0))
        data = memoryview(whole)[start:]
        digests, zeros = blake3_of_blocks(bytes(data), block_size, 16), zeros_of_blocks(bytes(data), block_size)
        for implementation in IMPLEMENTATIONS:
            assert digest_and_map(data, block_size, 16, implementation) == (digests, zeros)

    def test_the_largest_block(self) -> None:
        data = RANDOM * 6
        found = checksum.digest_blocks(data, KEY, block_size=checksum.BLOCK_SIZE_MAX, digest_size=32)
        assert found == blake3_of_blocks(data, checksum.BLOCK_SIZE_MAX, 32)

    def test_nothing_has_no_blocks(self) -> None:
        assert checksum.digest_blocks(b"", KEY) == b""
        assert checksum.digest_blocks_into(b"", KEY, bytearray(), bytearray()) == 0

    def test_defaults(self) -> None:
        data = RANDOM[: 3 * checksum.BLOCK_SIZE + 1]
        assert checksum.digest_blocks(data, KEY) == blake3_of_blocks(data, 65536, 16)

    def test_another_key_gives_other_digests(self) -> None:
        one, other = checksum.new_key(), checksum.new_key()
        assert len(one) == checksum.KEY_SIZE
        assert checksum.digest_blocks(RANDOM[:65536], one) != checksum.digest_blocks(RANDOM[:65536], other)
        assert checksum.digest_blocks(bytes(65536), one) != checksum.digest_blocks(bytes(65536), other)

    def test_parts_are_one_input(self) -> None:
        whole = checksum.keyed_digest(KEY, RANDOM[:5000])
        assert checksum.keyed_digest(KEY, RANDOM[:1], bytearray(RANDOM[1:4000]), memoryview(RANDOM)[4000:5000]) == whole
        assert checksum.keyed_digest(KEY) == bytes.fromhex(BLAKE3_VECTORS[0])

    def test_any_contiguous_buffer_counts_in_bytes(self) -> None:
        words = array("Q", range(10_000))
        assert checksum.digest_blocks(words, KEY) == checksum.digest_blocks(words.tobytes(), KEY)

    def test_what_lies_behind_the_last_block_is_left_alone(self) -> None:
        digests, zeros = bytearray(b"\xaa" * 100), bytearray(b"\xaa" * 9)
        assert checksum.digest_blocks_into(RANDOM[:100], KEY, digests, zeros) == 1
        assert digests[16:] == b"\xaa" * 84
        assert zeros == b"\x00" + b"\xaa" * 8


class TestZeros:
    @every_implementation
    def test_one_bit_anywhere(self, implementation: str) -> None:
        for length in [*range(0, 130), 191, 192, 193, 511, 512, 513, 575, 576, 577, 1100]:
            data = bytearray(length)
            assert checksum.is_zero(data, implementation)
            for at in range(length):
                data[at] = 1 << (at % 8)
                assert not checksum.is_zero(data, implementation), (length, at)
                data[at] = 0

    @every_implementation
    def test_map(self, implementation: str) -> None:
        data = bytearray(10 * 4096 + 1)
        data[4096 * 3 + 4095] = data[4096 * 7] = 1
        zeros = bytearray(11)
        assert checksum.zero_map(data, zeros, block_size=4096, implementation=implementation) == 11
        assert list(zeros) == [1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1]
        data[-1] = 1
        checksum.zero_map(data, zeros, block_size=4096, implementation=implementation)
        assert zeros[10] == 0


class TestDifferingBlocks:
    def test_names_each_that_differs(self) -> None:
        ours = bytearray(RANDOM[: 16 * 1000])
        theirs = bytearray(ours)
        assert checksum.differing_blocks(ours, theirs) == []
        for block in (0, 7, 999):
            theirs[16 * block + block % 16] ^= 1
        assert checksum.differing_blocks(ours, theirs) == [0, 7, 999]
        assert checksum.differing_blocks(ours, theirs, digest_size=32) == [0, 3, 499]

    def test_what_only_one_side_has_differs(self) -> None:
        digests = RANDOM[: 16 * 5]
        assert checksum.differing_blocks(digests, digests[:48]) == [3, 4]
        assert checksum.differing_blocks(digests[:48], digests) == [3, 4]
        assert checksum.differing_blocks(b"", b"") == []

    def test_part_of_a_digest_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"32 and 17 bytes are not both whole digests of 16 bytes"):
            checksum.differing_blocks(bytes(32), bytes(17))


class TestArguments:
    def test_too_small_outputs_are_refused_with_their_sizes(self) -> None:
        data = bytes(3 * 4096 + 1)
        with pytest.raises(ValueError, match=r"digests has 63 bytes, 4 blocks of 16 bytes each need 64"):
            checksum.digest_blocks_into(data, KEY, bytearray(63), None, block_size=4096)
        with pytest.raises(ValueError, match=r"zeros has 3 bytes, 4 blocks of 1 bytes each need 4"):
            checksum.digest_blocks_into(data, KEY, bytearray(64), bytearray(3), block_size=4096)
        with pytest.raises(ValueError, match=r"zeros has 3 bytes"):
            checksum.zero_map(data, bytearray(3), block_size=4096)

    @pytest.mark.parametrize("key", [b"", b"x" * 31, b"x" * 33])
    def test_a_key_has_32_bytes(self, key: bytes) -> None:
        with pytest.raises(ValueError, match=f"key has {len(key)} bytes, a BLAKE3 key has 32"):
            checksum.digest_blocks(b"data", key)
        with pytest.raises(ValueError, match=f"key has {len(key)} bytes"):
            checksum.keyed_digest(key, b"data")

    @pytest.mark.parametrize("block_size", [-(2**62), -1, 0, checksum.BLOCK_SIZE_MAX + 1, 2**62])
    def test_block_sizes_are_bounded(self, block_size: int) -> None:
        message = f"block_size is {block_size}, must be 1 to 16777216"
        with pytest.raises(ValueError, match=message):
            checksum.digest_blocks(b"data", KEY, block_size=block_size)
        with pytest.raises(ValueError, match=message):
            checksum.digest_blocks_into(b"data", KEY, bytearray(64), None, block_size=block_size)
        with pytest.raises(ValueError, match=message):
            checksum.zero_map(b"data", bytearray(64), block_size=block_size)

    @pytest.mark.parametrize("digest_size", [-1, 0, 15, 33])
    def test_digest_sizes_are_bounded(self, digest_size: int) -> None:
        with pytest.raises(ValueError, match=f"digest_size is {digest_size}, must be 16 to 32"):
            checksum.digest_blocks_into(b"data", KEY, bytearray(64), None, digest_size=digest_size)
        with pytest.raises(ValueError, match=f"digest_size is {digest_size}, must be 16 to 32"):
            checksum.digest_blocks(b"data", KEY, digest_size=digest_size)
        with pytest.raises(ValueError, match=f"digest_size is {digest_size}, must be 16 to 32"):
            checksum.differing_blocks(b"", b"", digest_size=digest_size)

    def test_read_only_outputs_are_refused(self) -> None:
        with pytest.raises(BufferError, match="digests must be writable"):
            checksum.digest_blocks_into(b"data", KEY, bytes(64), None)
        with pytest.raises(BufferError, match="zeros must be writable"):
            checksum.digest_blocks_into(b"data", KEY, bytearray(64), bytes(64))
        with pytest.raises(BufferError, match="zeros must be writable"):
            checksum.zero_map(b"data", memoryview(bytes(64)))

    def test_buffers_with_gaps_are_refused(self) -> None:
        gaps = memoryview(bytearray(1000))[::2]
        with pytest.raises(BufferError):
            checksum.crc32c(gaps)
        with pytest.raises(BufferError):
            checksum.is_zero(gaps)
        with pytest.raises(BufferError):
            checksum.digest_blocks_into(gaps, KEY, bytearray(64), None)
        with pytest.raises(BufferError):
            checksum.digest_blocks_into(b"data", KEY, gaps, None)
        with pytest.raises(BufferError):
            checksum.digest_blocks_into(b"data", KEY, bytearray(64), gaps)

    def test_outputs_in_the_data_are_refused(self) -> None:
        both = memoryview(bytearray(1000))
        with pytest.raises(ValueError, match=r"digests lies in the memory of data"):
            checksum.digest_blocks_into(both[:500], KEY, both[499:], None)
        with pytest.raises(ValueError, match=r"zeros lies in the memory of data"):
            checksum.zero_map(both[1:], both[:2])
        assert checksum.zero_map(both[500:], both[:500]) == 1

    def test_refused_calls_let_go_of_their_buffers(self) -> None:
        data, digests, zeros = bytearray(10), bytearray(1), bytearray(0)
        for _ in range(3):
            with pytest.raises(ValueError, match="digests has 1 bytes"):
                checksum.digest_blocks_into(data, KEY, digests, zeros)
        for buffer in (data, digests, zeros):
            buffer.append(1)

    def test_unknown_implementations_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"no checksum implementation 'quantum'"):
            checksum.crc32c(b"", 0, "quantum")
        with pytest.raises(ValueError, match=r"no checksum implementation 'quantum'"):
            checksum.digest_blocks(b"data", KEY, implementation="quantum")


def test_the_portable_implementation_is_always_there() -> None:
    assert IMPLEMENTATIONS[0] == "portable"
    assert len(set(IMPLEMENTATIONS)) == len(IMPLEMENTATIONS)
    assert all(isinstance(name, str) for name in checksum.cpu_features())


def test_many_threads_agree() -> None:
    expected = blake3_of_blocks(RANDOM, 65536, 16)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: checksum.digest_blocks(RANDOM, KEY), range(32))) == {expected}


@pytest.fixture
def unhurried_interpreter() -> Iterator[None]:
    """Threads take turns only where one lets go by itself."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("unhurried_interpreter")
def test_other_threads_run_meanwhile_and_cannot_resize_the_buffer() -> None:
    def resized_while_digesting() -> bool:
        data = bytearray(RANDOM) * 10
        begun = threading.Event()

        def digest() -> None:
            begun.set()
            checksum.digest_blocks(data, KEY, implementation="portable")

        thread = threading.Thread(target=digest)
        thread.start()
        begun.wait(10)
        try:
            data.append(0)
        except BufferError:
            return False
        finally:
            thread.join(30)
        return True

    # If the machine is so busy that this thread comes too late, that is no failure; if it always does, it is.
    assert not all(resized_while_digesting() for _ in range(5))


PAGE = mmap.PAGESIZE
GUARDED = 40 * PAGE


def _guarded_memory() -> memoryview:
    """Memory between two pages that nothing may touch."""
    memory = mmap.mmap(-1, GUARDED + 2 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    prot_none = 0
    for guard in (address, address + PAGE + GUARDED):
        if mprotect(guard, PAGE, prot_none) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    return memoryview(memory)[PAGE : PAGE + GUARDED]


def check_against_guard_pages(implementation: str) -> None:
    """Run everything on data that begins right after, or ends right before, forbidden memory.

    At the end of memory a length is an alignment too. Ends the process if a forbidden page is touched.
    """
    memory, digest_memory, zero_memory = _guarded_memory(), _guarded_memory(), _guarded_memory()
    memory[:] = RANDOM[:GUARDED]
    lengths = sorted({*range(0, 700), *(edge + more for edge in EDGES for more in range(-2, 66, 3) if edge + more > 0)})
    for length in lengths:
        for data in (memory[:length], memory[GUARDED - length :]):
            copy = bytes(data)
            assert checksum.crc32c(data, 1, implementation) == crc32c.crc32c(copy, 1)
            assert not checksum.is_zero(data, implementation) or not any(copy)
            block_size = 1024 if length < 4096 else 4096
            blocks = checksum.block_count(length, block_size)
            digests, zeros = digest_memory[GUARDED - 16 * blocks :], zero_memory[GUARDED - blocks :]
            checksum.digest_blocks_into(data, KEY, digests, zeros, block_size=block_size, implementation=implementation)
            assert digests == blake3_of_blocks(copy, block_size, 16)
            assert (
                checksum.keyed_digest(KEY, data, implementation=implementation) == blake3.blake3(copy, key=KEY).digest()
            )
    memory[:] = bytes(GUARDED)
    for length in lengths:
        for data in (memory[:length], memory[GUARDED - length :]):
            assert checksum.is_zero(data, implementation)
            blocks = checksum.block_count(length, 512)
            assert checksum.zero_map(data, zero_memory[GUARDED - blocks :], block_size=512) == blocks


@every_implementation
def test_forbidden_memory_is_not_touched(implementation: str) -> None:
    program = f"from tests.unit.test_checksum import check_against_guard_pages as check; check({implementation!r})"
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", program], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_guard_pages_guard() -> None:
    program = (
        "import ctypes; from tests.unit.test_checksum import _guarded_memory as guarded, GUARDED;"
        "ctypes.string_at(ctypes.addressof(ctypes.c_char.from_buffer(guarded())) + GUARDED, 1)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
    assert done.returncode == -11

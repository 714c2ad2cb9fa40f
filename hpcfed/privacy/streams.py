"""Random numbers that nobody without the key can foresee: SHAKE-256 over a key and a purpose.

The public seed of `hpcfed.rng` would not do: whoever knows the noise can take it off again.
"""

import hashlib

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

KEY_BYTES = 32
CHUNK = 1 << 20  # numbers that are drawn at a time


def public_key(seed: int) -> bytes:
    """The key of privacy.secret=false, which everybody can compute."""
    return hashlib.blake2b(f"{seed}/public".encode(), digest_size=KEY_BYTES).digest()


def digest(key: bytes) -> str:
    """What may be known of a key: whether it is the same."""
    return hashlib.sha256(b"hpcfed key" + key).hexdigest()


def uniforms(key: bytes, purpose: str, number: int, size: int) -> Floats:
    """(size,) in (0, 1], multiples of 2^-53; the same for the same key, purpose and number."""
    drawn = np.empty(size)
    for start in range(0, size, CHUNK):
        own = drawn[start : start + CHUNK]
        stream = hashlib.shake_256(key + f"{purpose}/{number}/{start}".encode())
        bits = np.frombuffer(stream.digest(8 * len(own)), dtype="<u8") >> np.uint64(11)
        own[:] = (bits.astype(np.float64) + 1) * 2.0**-53
    return drawn


def normals(key: bytes, purpose: str, number: int, size: int) -> Floats:
    """(size,) standard normal (Box and Muller 1958); none is beyond 8.6."""
    pairs = -(-size // 2)
    radius, angle = uniforms(key, purpose, number, 2 * pairs).reshape(2, pairs)
    radius = np.sqrt(-2 * np.log(radius))
    angle *= 2 * np.pi
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]


def coins(key: bytes, purpose: str, number: int, size: int, rate: float) -> list[int]:
    """Which of `size` are drawn, each by itself with this rate, ascending (Poisson sampling)."""
    drawn = np.flatnonzero(uniforms(key, purpose, number, size) <= rate)
    return [int(k) for k in drawn]

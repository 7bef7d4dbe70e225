"""Write tests/ckks/vectors/*.json from the reference alone: `python -m tests.ckks.make_vectors`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from tensorguard.ckks import get_parameter_set
from tests.ckks import reference

FOLDER = Path(__file__).parent / "vectors"


def write(name: str, content: object) -> None:
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / name).write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    degrees = {}
    for name in ("n4096-q90-w12", "n8192-q150-w12"):
        parameters = get_parameter_set(name)
        degree = parameters.degree
        positions = [0, 1, 2, 63, 64, 65, 777, 2048, *([4096, 4097, 4160] if degree == 8192 else []), degree - 1]
        rows = []
        for prime in parameters.primes:
            polynomial = np.array([(n * n * 31 + 7 * n + 1) % prime for n in range(degree)], np.uint64)
            values = reference.transform_by_definition(polynomial, prime)
            rows.append(
                {
                    "prime": prime,
                    "psi": reference.root(prime, degree),
                    "positions": positions,
                    "values": values[positions].tolist(),
                }
            )
        degrees[str(degree)] = rows
    write("ntt.json", {"polynomial": "31 n^2 + 7 n + 1 mod p", "degrees": degrees})

    parameters = get_parameter_set("n4096-q90-w12")
    seed, session = bytes(range(32)), b"known session"
    expansions = []
    for label, identifier in ((reference.CIPHERTEXT, 1), (reference.CIPHERTEXT, 2**63 + 5), (reference.PUBLIC_KEY, 0)):
        residues = reference.expand(parameters, label, session, identifier, seed)
        expansions.append(
            {
                "label": label.decode(),
                "identifier": str(identifier),
                "first": residues[:, :4].tolist(),
                "last": residues[:, -4:].tolist(),
                "sha256": hashlib.sha256(residues.astype("<u4").tobytes()).hexdigest(),
            }
        )
    write(
        "expansion.json",
        {"parameters": parameters.name, "session": session.decode(), "seed": seed.hex(), "expansions": expansions},
    )


if __name__ == "__main__":
    main()

"""Draw all pictures, into the folder given or beside this file."""

import sys
from pathlib import Path

from pictures import islands, rates, scaling, states, timeline
from pictures.paper import save

PICTURES = {
    "timeline": timeline.draw,
    "states": states.draw,
    "islands": islands.draw,
    "scaling": scaling.draw_steps,
    "hiding-tau": scaling.draw_taus,
    "rates": rates.draw,
}


def main(folder: Path) -> None:
    for name, draw in PICTURES.items():
        save(draw(), folder / f"{name}.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)

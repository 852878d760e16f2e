"""Everyday questions for the drafters' training data: what people ask of an assistant, crossed with what about.

    python scripts/general_prompts.py 2000 > general.jsonl

Written for this purpose: none comes from a benchmark.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from pearl.config import cli

ASKED = """
Explain {} to a ten-year-old.
Write a short story about {}.
Write a blog post about {}.
Write a poem about {}.
What are the main advantages and disadvantages of {}?
Give me five facts about {}.
Describe the history of {}.
How does {} work? Explain it step by step.
Write an email to a colleague about {}.
Summarize what a beginner should know about {}.
What are common misconceptions about {}?
Compare {} with its closest alternative.
Pretend that you are an expert on {} and answer questions from the public.
Write a dialogue between two friends who disagree about {}.
Draft a speech about {} for a school assembly.
Make a list of questions to ask in an interview about {}.
What role does {} play in the economy?
Which ethical questions does {} raise?
Propose a plan to teach {} in one week.
Write a product description for something inspired by {}.
What would the world look like without {}?
Write a persuasive essay in favour of {}.
Give a definition of {} and two examples.
What recent developments have there been in {}?
Imagine that you are a travel guide: tell your group about {}.
Outline a research project on {}.
Write the introduction of a book on {}.
How has {} influenced art and literature?
What mathematics is needed to understand {}?
Suggest three ways to improve {}.
""".strip().splitlines()

ABOUT = """
photosynthesis; gravity; the water cycle; volcanoes; black holes; vaccines; the human heart; DNA; antibiotics
climate change; solar energy; nuclear power; electric cars; bicycles; railways; airplanes; sailing ships; bridges
skyscrapers; city parks; the printing press; the telephone; the internet; artificial intelligence; robots
encryption; databases; computer games; the stock market; inflation; small businesses; taxes; insurance; remote work
job interviews; teamwork; leadership; chess; football; swimming; mountain climbing; yoga; cooking pasta
baking bread; coffee; tea; chocolate; cheese; gardening; dogs; cats; bees; whales; elephants; migrating birds
forests; deserts; coral reefs; rivers; islands; the moon; the planets; classical music; jazz; the guitar; painting
photography; theatre; film; poetry; fairy tales; museums; libraries; the Roman Empire; ancient Egypt; the Silk Road
the Renaissance; the industrial revolution; democracy; human rights; elections; learning a language; memory; sleep
dreams; friendship; kindness; patience; fear; humour; curiosity; honesty; time management; probability; geometry
prime numbers; statistics; algebra; calculus; logic puzzles; sorting algorithms; recursion; binary numbers
earthquakes; hurricanes; recycling; clean water; public transport; healthy eating; exercise; first aid; schools
universities
""".replace("\n", ";").split(";")


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("scripts/general_prompts.py", about=__doc__.splitlines()[0])
    parser.add_argument("count", nargs="?", type=cli.at_least_one, default=2000, help="how many (default: 2000)")
    count = parser.parse_args(argv).count
    subjects = [subject.strip() for subject in ABOUT if subject.strip()]
    questions = [asked.format(subject) for asked, subject in itertools.product(ASKED, subjects)]
    for question in random.Random(0).sample(questions, min(count, len(questions))):
        print(json.dumps({"prompt": question}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

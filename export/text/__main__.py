"""`python -m export.text`: the text side of zero-shot classification, for a bundle or for
distill.evaluate.

A student distilled from a CLIP teacher predicts that teacher's image embeddings; the text
embeddings come from the teacher's own text tower (open_clip). They are computed here once per
class, and `--with-encoder` exports the tower itself to ONNX. Without a CLIP teacher, `--classifier`
takes the classes of another teacher's own classifier (classifier_rows.py).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from contract.command_line import CommandLine
from contract.errors import exit_status
from export.text.embeddings import write_embeddings
from export.text.options import TextOptions

EPILOG = """\
examples:
  python -m export.text --output bundles/mine --labels labels.txt \\
      --model ViT-B-16 --pretrained openai
  python -m export.text --output bundles/mine --labels labels.txt \\
      --model ViT-B-16-quickgelu --pretrained openai.safetensors
  python -m export.text --output bundles/mine --labels labels.txt \\
      --model ViT-L-14 --pretrained datacomp_xl_s13b_b90k \\
      --templates templates.txt --with-encoder
  python -m export.text --output /tmp/trial --labels labels.txt \\
      --model ViT-B-16 --pretrained random
  python -m export.text --output bundles/quickstart --labels imagenet.txt \\
      --classifier cls --run runs/quickstart

labels.txt has a class per line, named as in the data (its folder), and other
words for the prompt after a tab:
  n02099601<tab>golden retriever
templates.txt has a sentence per line with {} for the label, such as
`a photo of a {}.`; the default is eight general sentences.

--model is open_clip's name, or a .json file of its configuration format. Use
the model and weights of the run's CLIP teacher: embeddings of another CLIP are
in another space. With a file for --pretrained, weights of OpenAI, DFN and
MetaCLIP need the -quickgelu variant of the model; a tag selects it by itself.

--classifier is for runs without a CLIP teacher. Labels are ImageNet's own
(`tabby cat`, `espresso`, n02123045), each represented by its row in the
classifier of that teacher of RUN. Scores are the classifier's logits, computed
from the student's <teacher>_token. The vocabulary is the one that the teacher
was trained on; no text is encoded, so this is not zero-shot classification.

Writes class_embeddings.safetensors. --with-encoder also writes
text_encoder.onnx (token ids int64 [B, context] -> text_embedding float32
[B, d], normalized), text_encoder.json, and the vocabulary of the tokenizer.
Exit status: 0 success, 1 failure, 2 usage error.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = CommandLine(
        prog="python -m export.text",
        description="Write the text embeddings of class labels, and the text tower itself, for\n"
        "zero-shot classification.",
        epilog=EPILOG,
        argument_default=argparse.SUPPRESS,  # defaults are those of TextOptions
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="a bundle, or any folder; created if missing"
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="open_clip's name of the CLIP teacher, or a .json configuration",
    )
    parser.add_argument(
        "--pretrained",
        metavar="TAG|FILE|random",
        help="open_clip's tag of the weights, or a local file",
    )
    parser.add_argument(
        "--classifier",
        metavar="LABEL",
        help="instead of a CLIP: label of the teacher of RUN whose classifier to use",
    )
    parser.add_argument(
        "--run", type=Path, metavar="RUN", help="run folder of distill.run, for --classifier"
    )
    parser.add_argument(
        "--teacher",
        metavar="LABEL",
        help="the bundle's CLIP teacher, if it has several of one width",
    )
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help="text file with a class per line"
    )
    parser.add_argument(
        "--templates",
        type=Path,
        metavar="FILE",
        help="text file with a sentence per line, {} for the label (default: eight sentences)",
    )
    parser.add_argument(
        "--with-encoder",
        action="store_true",
        help="write the text tower as ONNX too, for labels that come later",
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="prompts encoded at a time (default: 64)"
    )
    args = parser.parse_args(arguments)
    return exit_status(lambda: write_embeddings(TextOptions(**vars(args))))


if __name__ == "__main__":
    sys.exit(main())

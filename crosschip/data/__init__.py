"""Data: text, chats and verifiable problems; the tokenizer; the resumable streams of training batches."""

from crosschip.data.answers import check_answer, split_reasoning
from crosschip.data.arithmetic import Problem, held_out_problems, make_problem
from crosschip.data.batch import NOT_TRAINED, Batch, TrainStream
from crosschip.data.chat_stream import ChatStream, prepare_chat
from crosschip.data.packed import PackedStream, prepare_packed
from crosschip.data.rows import Message, Row, Split, ToolCall
from crosschip.data.source import Source, open_source
from crosschip.data.tokenizer import ChatTokenizer, load_tokenizer, train_tokenizer
from crosschip.data.tool_support import ToolSupport

__all__ = [
    "NOT_TRAINED",
    "Batch",
    "ChatStream",
    "ChatTokenizer",
    "Message",
    "PackedStream",
    "Problem",
    "Row",
    "Source",
    "Split",
    "ToolCall",
    "ToolSupport",
    "TrainStream",
    "check_answer",
    "held_out_problems",
    "load_tokenizer",
    "make_problem",
    "open_source",
    "prepare_chat",
    "prepare_packed",
    "split_reasoning",
    "train_tokenizer",
]

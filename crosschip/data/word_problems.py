"""Little stories with numbers in them, each with the sums that answer it."""

from __future__ import annotations

import random
from collections.abc import Callable

from crosschip.data.written_methods import add, divide, multiply_by_digit, subtract

__all__ = ["STORIES", "Story"]

Story = tuple[str, str, int]  # question, steps, result

_NAMES = ("Ana", "Ben", "Chen", "Dora", "Emil", "Farah", "Goran", "Hana", "Ivan", "Jun", "Kofi", "Lena", "Mira", "Noah")
_THINGS = ("apples", "stamps", "pencils", "marbles", "shells", "coins", "cards", "books", "pears", "stickers")
_BOXES = ("boxes", "bags", "baskets", "crates")


def _cast(rng: random.Random) -> tuple[str, str, str]:
    first, second = rng.sample(_NAMES, 2)
    return first, second, rng.choice(_THINGS)


def _gains_and_gives(rng: random.Random) -> Story:
    name, friend, thing = _cast(rng)
    has, buys = rng.randint(10, 99), rng.randint(10, 99)
    gives = rng.randint(2, has + buys - 1)
    question = f"{name} has {has} {thing}, buys {buys} more and gives {gives} to {friend}. How many {thing} are left?"
    first, total = add(has, buys)
    second, left = subtract(total, gives)
    return question, f"{first} {second}", left


def _boxes_and_some(rng: random.Random) -> Story:
    name, _, thing = _cast(rng)
    boxes, each, loose = rng.randint(2, 9), rng.randint(11, 99), rng.randint(2, 99)
    question = (
        f"{name} has {boxes} {rng.choice(_BOXES)} with {each} {thing} in each, and {loose} {thing} beside them. "
        f"How many {thing} is that in all?"
    )
    first, packed = multiply_by_digit(each, boxes)
    second, total = add(packed, loose)
    return question, f"{first} {second}", total


def _sharing(rng: random.Random) -> Story:
    name, _, thing = _cast(rng)
    friends, each = rng.randint(2, 9), rng.randint(11, 99)
    keeps = rng.randint(2, 99)
    has = friends * each + keeps
    question = (
        f"{name} has {has} {thing}, keeps {keeps} and shares the others equally among {friends} friends. "
        f"How many {thing} does each friend get?"
    )
    first, shared = subtract(has, keeps)
    second, share = divide(shared, friends)
    return question, f"{first} {second}", share


def _more_than(rng: random.Random) -> Story:
    name, friend, thing = _cast(rng)
    has, more = rng.randint(10, 99), rng.randint(2, 99)
    question = (
        f"{name} has {has} {thing}. {friend} has {more} more than {name}. How many {thing} do they have together?"
    )
    first, other = add(has, more)
    second, total = add(has, other)
    return question, f"{first} {second}", total


def _paying(rng: random.Random) -> Story:
    name, _, thing = _cast(rng)
    count, price = rng.randint(2, 9), rng.randint(11, 99)
    paid = rng.randint(count * price + 1, 999)
    question = f"{name} buys {count} {thing} for {price} dollars each and pays with {paid}. How many dollars come back?"
    first, cost = multiply_by_digit(price, count)
    second, change = subtract(paid, cost)
    return question, f"{first} {second}", change


STORIES: tuple[Callable[[random.Random], Story], ...] = (
    _gains_and_gives,
    _boxes_and_some,
    _sharing,
    _more_than,
    _paying,
)

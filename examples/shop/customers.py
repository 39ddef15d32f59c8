"""The shop's customers: a reproducible crowd that places its orders over HTTP, several at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from shop.bank import DECLINED_CARD

GOOD_CARD = "4242 4242 4242 4242"
DECLINED_SHARE = 0.1
NOBODY_SHARE = 0.02
PRODUCTS = {"Teapot": "24.90", "Cup": "7.50", "Sugar bowl": "12.00", "Assam tea": "9.80", "Tea towel": "6.25"}
NAMES = ("Ada", "Edgar", "Grace", "Jim", "Michael", "Barbara", "Raymond", "Patricia")
NOBODY = "nobody@mail.example"
TIMEOUT = 30  # seconds for one answer


@dataclass(frozen=True)
class Answer:
    """What the shop told a customer: 201 with an order, or 402 with one that was rolled back."""

    status: int
    order_id: int
    jobs: tuple[str, ...]


class OrderFailed(Exception):
    """The shop gave an answer that is neither yes nor no."""


def write_orders(count: int, seed: int) -> list[dict[str, Any]]:
    """So many orders, the same for the same seed. Of ten or more some are paid with a card that the bank
    declines, and some give an address that does not exist.
    """
    dice = random.Random(seed)
    strange = dice.sample(range(count), share(count, DECLINED_SHARE) + share(count, NOBODY_SHARE))
    declined = set(strange[: share(count, DECLINED_SHARE)])
    nobody = set(strange) - declined
    return [
        {
            "customer": (name := dice.choice(NAMES)),
            "email": NOBODY if number in nobody else f"{name.lower()}{number}@mail.example",
            "card": DECLINED_CARD if number in declined else GOOD_CARD,
            "lines": [
                {"product": product, "quantity": dice.randint(1, 6), "unit_price": PRODUCTS[product]}
                for product in dice.sample(list(PRODUCTS), dice.randint(1, 4))
            ],
        }
        for number in range(count)
    ]


def share(count: int, part: float) -> int:
    """That part of `count`: at least one of ten or more."""
    return max(round(count * part), 1 if count >= 10 else 0)


class Customers:
    """Place orders, `at_once` of them in flight, as soon as it is entered; left, it waits for those under
    way and gives up the others.
    """

    def __init__(self, url: str, orders: Sequence[dict[str, Any]], *, at_once: int = 8) -> None:
        self._orders = orders
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix="customer")
        # Nothing from the environment: a proxy has no business between us and our own shop.
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT, trust_env=False)
        self._answers: list[Future[Answer]] = []

    def __enter__(self) -> Customers:
        self._answers = [self._pool.submit(self._place, order) for order in self._orders]
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._http.close()

    def answers(self) -> list[Answer]:
        """The answers so far; raises what went wrong with an order that got none."""
        return [answer.result() for answer in self._answers if answer.done()]

    def _place(self, order: dict[str, Any]) -> Answer:
        try:
            response = self._http.post("/orders", json=order)
        except httpx.HTTPError as error:
            raise OrderFailed(f"POST /orders got no answer: {error!r}") from error
        if response.status_code not in (201, 402):
            raise OrderFailed(f"POST /orders answered {response.status_code}: {response.text[:500]}")
        receipt = response.json()
        return Answer(response.status_code, receipt["order_id"], tuple(receipt["jobs"].values()))

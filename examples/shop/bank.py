"""Stands for the bank."""

from __future__ import annotations

from decimal import Decimal

DECLINED_CARD = "4000 0000 0000 0002"


class PaymentDeclined(Exception):
    """The bank says no."""


def charge(card: str, total: Decimal) -> None:
    """Take the money; PaymentDeclined for one card."""
    if card == DECLINED_CARD:
        raise PaymentDeclined(f"{total} EUR")

"""An in-memory SQLite database with money on the move. Commands: check, stats.

Every transaction moves an amount between two accounts and notes it, so the sum of the balances
stays, and the notes explain every balance.
"""

from __future__ import annotations

import json
import random
import sqlite3

from pytarget import Crew, serve

ACCOUNTS, EACH = 5000, 1000
QUERIES = (
    "PRAGMA integrity_check",
    "SELECT sum(balance), count(*) FROM account",
    """SELECT count(*) FROM account WHERE balance != :each
        + coalesce((SELECT sum(amount) FROM move WHERE payee = id), 0)
        - coalesce((SELECT sum(amount) FROM move WHERE payer = id), 0)""",
    "SELECT count(*) FROM move",
)


def main() -> None:
    """Move money in one thread until told to stop."""
    db = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
    db.executescript(
        """
        CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER, note TEXT);
        CREATE TABLE move (payer INTEGER, payee INTEGER, amount INTEGER);
        CREATE INDEX by_payer ON move (payer);
        CREATE INDEX by_payee ON move (payee);
        """
    )
    rows = ((i, EACH, f"account {i} " * 8) for i in range(ACCOUNTS))
    db.execute("BEGIN")
    db.executemany("INSERT INTO account VALUES (?, ?, ?)", rows)
    db.execute("COMMIT")
    draw = random.Random(1)
    moves = 0

    def move() -> None:
        nonlocal moves
        payer, payee = draw.sample(range(ACCOUNTS), 2)
        amount = draw.randint(1, 50)
        db.execute("BEGIN")
        db.execute("UPDATE account SET balance = balance - ? WHERE id = ?", (amount, payer))
        db.execute("UPDATE account SET balance = balance + ? WHERE id = ?", (amount, payee))
        db.execute("INSERT INTO move VALUES (?, ?, ?)", (payer, payee, amount))
        db.execute("COMMIT")
        moves += 1

    crew = Crew(move)

    def check() -> bool:
        with crew:
            return [db.execute(query, {"each": EACH}).fetchone() for query in QUERIES] == [
                ("ok",),
                (ACCOUNTS * EACH, ACCOUNTS),
                (0,),
                (moves,),
            ]

    serve({}, {"stats": lambda: json.dumps({"moves": moves})}, check)


main()

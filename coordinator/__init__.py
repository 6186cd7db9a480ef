"""The coordinator: puts the bytes of all nodes in order and keeps the ledger. Never imports torch, nor the node.

Decisions are pure (`pace`, `rounds`, `membership`, `conductor`): events and the time in, effects and reasons out. Only
`service`, `ledger` and `rundir` touch sockets and files; only `cli` speaks to a person.
"""

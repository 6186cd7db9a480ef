"""What travels between node and coordinator: messages, sockets, keys, tickets, and the count of every byte.

Nothing here decides anything about the run; it imports zo for the types of the ledger and nothing above it.
"""

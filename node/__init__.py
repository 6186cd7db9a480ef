"""What runs on a device: base model, adapters, private data, service and command line.

Imports zo and transport, never coordinator.
"""

"""What setup.py needs to compile the native libraries."""

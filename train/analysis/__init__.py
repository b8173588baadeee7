"""What a compiled step needs: memory, FLOPs, bytes, collectives, read from the program itself."""

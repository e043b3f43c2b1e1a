"""The peers: the same networks, quantities and loops in other libraries."""

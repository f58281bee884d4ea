"""HTTP for stores and fleets: connections by proxies, and bodies, which end when they stall."""

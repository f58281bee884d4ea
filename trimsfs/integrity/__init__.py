"""Data integrity: digests of whole objects, scrubbing, repair, quarantine and signatures."""

"""The packages of both programs, in the order in which they may import each other."""

RANKS = {
    "trimsfs": [
        {"extras"},
        {"cli"},
        {"server"},
        {"fuse"},
        {"filesystem"},
        {"control"},
        {"integrity"},
        {"prefetch"},
        {"opening"},
        {"fetch", "namespace"},
        {"tiers", "stores"},
        {"client", "handover"},
        {"formats", "concurrency"},
        {"telemetry"},
        {"options"},
    ],
    "mountctl": [{"extras"}, {"commands"}, {"containers"}, {"keeper"}, {"linux"}],
}
"""The packages of each program from the top down; those of one rank do not import each other. The modules at a
program's root are below all of them."""

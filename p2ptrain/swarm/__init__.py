from p2ptrain.swarm.hivemind_parts import load_by_parts

# Before anything here imports hivemind.
load_by_parts()

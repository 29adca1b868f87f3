"""How tests have XLA compile programs that run a few times only."""

# No LLVM optimization, and the plain emitter of fused loops: compiles in half the time or less, runs slower.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)

# shellcheck shell=bash
# The part of install.sh that says what suits a machine; it is sourced there. As `llava-deploy doctor` says it, too.

cuda_driver() { # [FILE]: major version of NVIDIA's driver; 0 where there is none
    local file=${1:-/proc/driver/nvidia/version} text=''
    [[ ! -r $file ]] || text="$(<"$file")"
    if [[ $text =~ Kernel\ Module\ +(for\ [^\ ]+\ +)?([0-9]+)\. ]]; then echo "${BASH_REMATCH[2]}"; else echo 0; fi
}

capability() { # of the first GPU, as 89; nothing where nobody says
    local said
    said="$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)" || true
    [[ ! $said =~ ^([0-9]+)\.([0-9])$ ]] || echo "${BASH_REMATCH[1]}${BASH_REMATCH[2]}"
}

extras_for() { # ARCHITECTURE DRIVER CAPABILITY: TensorRT for RTX where it runs, else ONNX Runtime on the GPU
    local least=525 # of CUDA 12
    [[ $1 == x86_64 ]] || least=580 # of CUDA 13: there are no wheels for an older one
    if (($2 < least || ${3:-89} < 60)); then
        echo cpu
    elif [[ $1 == x86_64 && ( ${3:-89} =~ ^(80|86|89)$ || ${3:-89} -ge 120 ) ]]; then
        echo cpu,rtx,build
    else
        echo gpu,build
    fi
}

onnxruntime_gpu() { # ARCHITECTURE DRIVER CAPABILITY: what pip is asked for, with CUDA's and cuDNN's libraries
    local release=''
    if [[ $1 == x86_64 ]]; then
        case ${3:-89} in
            75 | 80 | 86 | 89 | 90 | 120 | 121) ;;
            100) release='<1.29' ;; # later ones hold no code for it
            *) release='<1.27' ;;   # for CUDA 12, and holds what later GPUs compile
        esac
        (($2 == 0 || $2 >= 580)) || release='<1.27'
    fi
    echo "onnxruntime-gpu[cuda,cudnn]$release"
}

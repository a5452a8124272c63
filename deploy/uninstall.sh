#!/usr/bin/env bash
# Removes what install.sh has made, from the list that it kept, and nothing else. See README.md.
set -euo pipefail

usage() {
    cat <<'EOF'
Usage: uninstall.sh [OPTIONS]

Removes what install.sh has made: services, program, user. Models and their settings stay, unless they are to be purged.

  --purge          models and their settings, too
  --prefix DIR     where the program is; by default where this script lies, or /opt/llava-deploy
  --root DIR       as install.sh was given
  --dry-run        print the commands, do nothing
  --help           show this
EOF
}

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}
run() {
    printf '  $'
    printf ' %q' "$@"
    printf '\n'
    [[ $dry == yes ]] || "$@"
}

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
prefix='' root='' purge=no dry=no
while (($#)); do
    case $1 in
        --prefix | --root)
            (($# > 1)) && [[ -n $2 ]] || die "$1: want a value behind it; see --help"
            printf -v "${1#--}" '%s' "$2"
            shift
            ;;
        --purge) purge=yes ;;
        --dry-run) dry=yes ;;
        --help | -h) usage && exit ;;
        *) die "$1: not known; see --help" ;;
    esac
    shift
done
[[ -z $root || -d $root ]] || die "--root $root: no such directory"
[[ -z $root ]] || root="$(cd -- "$root" && pwd -P)"
[[ $root != / ]] || root=''
if [[ -z $prefix ]]; then
    prefix=/opt/llava-deploy
    [[ ! -f $here/installed || $here != "$root"/* ]] || prefix="${here#"$root"}"
fi
[[ $prefix =~ ^(/[A-Za-z0-9._-]+)+$ && ! $prefix =~ /\.\.?(/|$) ]] || die "--prefix $prefix: no path that install.sh takes"
list="$root$prefix/installed"
[[ -f $list ]] || die "$list: not there, so install.sh has made nothing below $root$prefix; name another --prefix or --root"
if ((EUID != 0)) && [[ ! -w $list ]]; then die "$list is root's: run this as root"; fi

# A line of the list that install.sh does not write is refused, all of them before anything is removed.
state=/var/lib/llava-deploy/models
pattern="^((tree $prefix/venvs/[0-9TZ.]+)|(tree $state/\\.[A-Za-z0-9._-]+)|(model $state/[A-Za-z0-9][A-Za-z0-9._-]*)"
pattern+="|(config /etc/llava-deploy/[A-Za-z0-9][A-Za-z0-9._-]*\\.env)|(link ($prefix/current|/usr/local/bin/llava-deploy))"
pattern+="|(file ($prefix/(uninstall\\.sh|bin/llava-deploy)|/etc/sysusers\\.d/llava-deploy\\.conf))"
pattern+="|(file /etc/systemd/system/llava-deploy@\\.service(\\.d/(gpu|jetson)\\.conf)?)"
pattern+="|(dir (/[A-Za-z0-9._@-]+)+)|(unit llava-deploy@[A-Za-z0-9._-]+\\.service)|(user llava-deploy))\$"
mapfile -t lines <"$list"
for line in "${lines[@]}"; do
    [[ $line =~ $pattern && ! $line =~ /\.\.?(/|$) ]] || die "$list: want lines as install.sh writes them, found: $line; nothing was removed"
done

models=0 systemd=no
[[ -n $root || ! -d /run/systemd/system ]] || systemd=yes
for line in "${lines[@]}"; do
    [[ $line != "unit "* || $systemd == no ]] || run systemctl disable --now "${line#* }" || true
done
for ((i = ${#lines[@]} - 1; i >= 0; i--)); do
    kind="${lines[i]%% *}" path="$root${lines[i]#* }"
    case $kind in
        tree) [[ ! -e $path ]] || run rm -rf -- "$path" ;;
        file) # this script stays with what it is for
            [[ ! -e $path || $models != 0 && $path == "$root$prefix/uninstall.sh" ]] || run rm -f -- "$path"
            ;;
        model | config)
            if [[ -e $path && $purge == yes ]]; then run rm -rf -- "$path"; fi
            if [[ -e $path && $purge == no ]]; then models=$((models + 1)) && printf '  %s stays\n' "$path"; fi
            ;;
        link)
            if [[ -L $path && $path == "$root$prefix/current" || $(readlink -- "$path") == *"${prefix#/}/bin/llava-deploy" ]]; then
                run rm -f -- "$path"
            elif [[ -e $path ]]; then
                printf '  %s leads elsewhere, and stays\n' "$path"
            fi
            ;;
    esac
done
run rm -f -- "$root$prefix/current.new"
if ((models == 0)); then run rm -f -- "$list"; fi
for ((i = ${#lines[@]} - 1; i >= 0; i--)); do
    path="$root${lines[i]#* }"
    case ${lines[i]} in
        "dir "*) [[ ! -d $path || -n $(ls -A -- "$path") && $dry == no ]] || run rmdir --ignore-fail-on-non-empty -- "$path" ;;
        "user llava-deploy") [[ -n $root ]] || run userdel llava-deploy || true ;;
    esac
done
[[ $systemd == no ]] || run systemctl daemon-reload
if ((models)); then printf 'Models and settings stay, with the list of them; away with them, too: %s --purge\n' "$root$prefix/uninstall.sh"; fi
